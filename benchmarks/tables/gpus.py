"""The table of what was timed on GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from .networks import NETWORKS
from .ops import SCORES, cases, speed
from .rows import Row, markdown, read, span, times

CURVES = {  # file: title
    "window_attention_taylor": "attention along curves, float32",
    "gelu_taylor": "GELU along curves, float32",
    "normalization_taylor": "LayerNorm, softmax, tanh, square along curves, float32",
}
OF_TORCH = ("torch.func", "nested torch.func", "vmap")


def gpus() -> str:
    """What was timed on a GPU, in bfloat16, against the fastest peer: called, and replayed as a CUDA graph."""
    lines = []
    for gpu, title, file, without in (
        ("H100", "window attention, batch 128, of 784 tokens 32", "window_attention", None),
        ("H100", "patch embedding with LayerNorm, batch 128", "patch_embed", None),
        ("H100", "patch merging, batch 128", "patch_merge", None),
        ("H200", "window attention, three axes", "window_attention_volumes", "N="),
    ):
        timed = cases(gpu.lower(), file, lambda case, without=without: without is None or without not in case)
        counted = len({case for case, _ in timed})
        spans = [
            span([speed(rows, key) for (_, found), rows in timed.items() if found == mode and rows[0].get(key)])
            for mode in ("forward", "both")
            for key in ("milliseconds", "replay_milliseconds")
        ]
        lines.append([f"{title} ({counted} cases)", gpu, *spans])
    lines += _derivatives()
    for file in ("models", "families"):
        rows = read("h100", file)
        for name, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
            modes = (
                [row for row in rows if (row["network"], row["batch"], row["mode"]) == (name, batch, mode)]
                for mode in ("inference", "train")
            )
            called = [times(speed(found)) if found else "" for found in modes]
            lines.append(
                [f"{NETWORKS.get(name, name).split(',')[0]}, batch {batch}", "H100", called[0], "", called[1], ""]
            )
    return markdown(["work", "GPU", "forward", "replayed", "forward and backward", "replayed"], lines)


def _derivatives() -> list[list[str]]:
    """Lines of ops along curves and of the passes behind the scores."""
    lines = []
    for file, title in CURVES.items():
        rows = read("h100", file)
        lines.append([f"{title} ({len({row['case'] for row in rows})} cases)", "H100", *against_torch(rows), "", ""])
    for work, case in SCORES.items():
        rows = [row for row in read("h100", "scores") if row["case"] == case]
        lines.append([work, "H100", *against_torch(rows), "", ""])
    return lines


def against_torch(rows: Sequence[Row]) -> list[str]:
    """How many times faster than the fastest of torch.func, called and replayed."""
    found: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        if row["provider"].startswith(("ours", *OF_TORCH)):
            found.setdefault(row["case"], ([], []))[row["provider"].startswith("ours")].append(row)
    return [
        span([min(float(row[key]) for row in theirs) / min(float(row[key]) for row in ours)
              for theirs, ours in found.values() if all(row[key] for row in (*theirs, *ours))])
        for key in ("milliseconds", "replay_milliseconds")
    ]  # fmt: skip
