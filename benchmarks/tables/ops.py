"""Tables of ops and of the passes behind the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .rows import ZEN3, ZEN4, ZEN5, Row, markdown, milliseconds, read, span, times

EAGER = ("eager", "unfold + LN + Linear", "conv NCHW + permute + LN")  # whose memory ours is compared with
OPS: dict[str, tuple[str, Callable[[str], bool]]] = {  # title: file, which cases
    "windows of 784 tokens": ("window_attention", lambda case: case.startswith("N=784")),
    "windows of 196 tokens": ("window_attention", lambda case: case.startswith("N=196")),
    "windows of 49 tokens": ("window_attention", lambda case: case.startswith("N=49") and "bias" not in case),
    "windows of 49 and 144 tokens with Swin's bias": (
        "window_attention",
        lambda case: case.startswith("N=") and "bias" in case,
    ),
    "windows of three axes, 98 to 392 tokens": ("window_attention", lambda case: not case.startswith("N=")),
    "patch merging, As-ViT's shapes": ("patch_merge", lambda case: "Swin" not in case),
    "patch merging, Swin-T's shapes": ("patch_merge", lambda case: "Swin" in case),
    "patch embedding with LayerNorm": ("patch_embed", lambda case: True),
}


def ops() -> str:
    """Ops against the fastest of torch's ways to do the same; beside them the speeds of earlier kernels on other
    processors."""
    header = ["op", "forward", "forward and backward", "peak memory of both, of eager"]
    lines = []
    for title, (name, belongs) in OPS.items():
        here, *others = (cases(processor, name, belongs) for processor in (ZEN4, ZEN3, ZEN5))
        memory = sorted(_memory(rows) for (_, mode), rows in here.items() if mode == "both")
        least, most = f"{memory[0]:.2f}", f"{memory[-1]:.2f}"
        shown = f"{least} x" if least == most else f"{least} to {most} x"
        lines.append([title, *_spans(here), shown, *(_spans(there)[1] for there in others)])
    return markdown([*header, "Zen 3, earlier: both", "Zen 5, earlier: both"], lines)


def cases(processor: str, name: str, belongs: Callable[[str], bool]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in read(processor, name):
        case, mode = _case_and_mode(row)
        if belongs(case):
            found.setdefault((case, mode), []).append(row)
    return found


def _spans(cases: dict[tuple[str, str], list[Row]]) -> list[str]:
    return [span([speed(rows) for (_, found), rows in cases.items() if found == mode]) for mode in ("forward", "both")]


def _case_and_mode(row: Row) -> tuple[str, str]:
    """Mode and dtype, with which a case of patch_embed.csv ends."""
    if row.get("mode"):
        return row["case"], row["mode"]
    case, mode, _ = row["case"].rsplit(", ", 2)
    return case, mode


def speed(rows: Sequence[Row], key: str = "milliseconds") -> float:
    found = {row["provider"]: float(row[key]) for row in rows if row[key]}
    return min(time for provider, time in found.items() if not provider.startswith("ours")) / found["ours"]


def _memory(rows: Sequence[Row]) -> float:
    found = {row["provider"]: float(row.get("peak_mebibytes") or row["peak_megabytes"]) for row in rows}
    return found["ours"] / next(found[name] for name in EAGER if name in found)


SCORES = {  # work: case, the peers of each column
    "value and first derivative, 10 points: length distortion": "order 1, 10 thetas, 224 px",
    "and the second: curvature": "order 2, 10 thetas, 224 px",
    "NTK Gram, 16 images": "NTK Gram, batch 16, 224 px",
}


def scores() -> str:
    """Passes behind the scores, against the fastest of torch.func eager and compiled, and of JAX."""
    lines = []
    for work, case in SCORES.items():
        found = {row["provider"]: milliseconds(row) for row in read(ZEN4, "scores") if row["case"] == case}
        ours = found.pop("ours")
        del found["reference"]
        line = [work, f"{ours / 1e3:.3f} s"]
        for belongs in ("eager", "compiled", "jax"):
            peer = min(time for name, time in found.items() if belongs in name)
            line.append(f"{peer / 1e3:.2f} s: {times(peer / ours)}")
        lines.append(line)
    return markdown(["work", "ours", "torch.func, eager", "compiled", "JAX"], lines)
