"""Tables of README and the documentation, made from the rows in benchmarks/results: no figure is copied by hand.

    python benchmarks/readme_tables.py [--write]

prints them, or puts them between the comments of the files. Of rows that were measured again the last count. A test
compares the files with this.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
PAGES = [
    ROOT / name for name in ("README.md", "docs/results.md", "docs/reference/families.md", "docs/guides/detect.md")
]
ZEN3, ZEN4, ZEN5 = "zen3", "zen4", "zen5"  # folders there, by the processor that measured
OURS = "ours"
EAGER = ("eager", "unfold + LN + Linear", "conv NCHW + permute + LN")  # whose memory ours is compared with
Row = dict[str, str]

NETWORKS = {
    "swin_tiny_patch4_window7_224": "Swin-T, batch 8",
    "swinv2_tiny_window8_256": "Swin-V2-T",
    "swin_t": "torchvision's swin_t",
    "nest_tiny_jx": "NesT-T",
    "twins_svt_small": "Twins-SVT-S",
    "davit_tiny": "DaViT-T",
    "convnext_tiny": "ConvNeXt-T (its Linear layers)",
    "tiny_vit_5m_224": "TinyViT-5M",
    "maxvit_tiny_tf_224": "MaxViT-T",
    "pvt_v2_b1": "PVT-V2-B1",
    "asvit_small": "As-ViT-S on our ops, against plain PyTorch operations",
}
OPS: dict[str, tuple[str, Callable[[str], bool]]] = {  # title: file, which cases
    "windows of 784 tokens": ("window_attention", lambda case: case.startswith("N=784")),
    "windows of 196 tokens": ("window_attention", lambda case: case.startswith("N=196")),
    "windows of 49 tokens": ("window_attention", lambda case: case.startswith("N=49") and "bias" not in case),
    "windows of 49 and 144 tokens with Swin's bias": ("window_attention", lambda case: "bias" in case),
    "patch merging, As-ViT's shapes": ("patch_merge", lambda case: "Swin" not in case),
    "patch merging, Swin-T's shapes": ("patch_merge", lambda case: "Swin" in case),
    "patch embedding with LayerNorm": ("patch_embed", lambda case: True),
}


def read(processor: str, name: str) -> list[Row]:
    """The rows of a file, of those with the same setting the last."""
    with open(RESULTS / processor / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    setting = (
        "case",
        "network",
        "provider",
        "mode",
        "dtype",
        "batch",
        "model",
        "schedule",
        "seed",
        "name",
        "windows",
        "min_size",
        "work",
        "detector",
    )
    return list({tuple(row.get(key) for key in setting): row for row in rows}.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace(" --- ", "---") for line in lines)


def times(factor: float) -> str:
    """A speed; bold where we lose."""
    text = f"{factor:.1f} x" if factor >= 1.995 else f"{factor:.2f} x"
    return text if factor >= 0.995 else f"**{text}**"


def span(factors: Sequence[float]) -> str:
    if not factors:
        return ""
    low, high = times(min(factors)), times(max(factors))
    return low if low == high else f"{low} to {high}"


def networks() -> str:
    """Inference and training steps of networks, against the fastest way in which the source runs."""
    header = ["network", "inference: source", "ours", "speed", "training step", "memory of a step"]
    lines = []
    for case, title in NETWORKS.items():
        inference, train = _of_network(ZEN4, case, "inference"), _of_network(ZEN4, case, "train")
        memory = float(train[OURS]["peak_mebibytes"]) / float(train["source"]["peak_mebibytes"])
        lines.append([title, *_comparison(inference, train), f"{memory:.2f} x", *_speeds(ZEN5, case)])
        if f"{OURS}-compiled" in inference:
            lines.append(["&nbsp; both compiled", *_comparison(inference, train, "-compiled"), "", "", ""])
    return markdown([*header, "Zen 5: inference", "training step"], lines)


def _of_network(processor: str, case: str, mode: str) -> dict[str, Row]:
    rows = read(processor, "models")
    return {row["provider"]: row for row in rows if row["network"] == case and row["mode"] == mode}


def _comparison(inference: dict[str, Row], train: dict[str, Row], compiled: str = "") -> list[str]:
    """Images per second of source and ours, the speed of inference and of a training step."""
    source, ours = _fastest(inference, bool(compiled)), inference[OURS + compiled]
    pace = [f"{float(row['images_per_second']):.1f}" for row in (source, ours)]
    factors = [
        _milliseconds(_fastest(found, bool(compiled))) / _milliseconds(found[OURS + compiled])
        for found in (inference, train)
    ]
    return [*pace, *map(times, factors)]


def _speeds(processor: str, case: str) -> list[str]:
    found = [_of_network(processor, case, mode) for mode in ("inference", "train")]
    return [times(_milliseconds(_fastest(one, False)) / _milliseconds(one[OURS])) for one in found]


def _fastest(providers: dict[str, Row], compiled: bool) -> Row:
    peers = [row for name, row in providers.items() if OURS not in name and ("compiled" in name) is compiled]
    return min(peers, key=_milliseconds)


def _milliseconds(row: Row) -> float:
    return float(row["milliseconds"])


RUNTIMES = {"source": "source", "compiled": "compiled", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def runtimes() -> str:
    """Inference in images per second against what else people take on a CPU, and what its products alone allow."""
    rows = [row for row in read(ZEN3, "runtimes") if row["mode"] == "inference"]
    header = ["network", "batch", *RUNTIMES.values(), OURS, "against the best", "products alone allow"]
    lines = []
    for name, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        found = {row["provider"]: row for row in rows if (row["network"], row["batch"]) == (name, batch)}
        pace = {provider: float(row["images_per_second"] or 0) for provider, row in found.items()}
        peers = [f"{pace[one]:.2f}" if pace.get(one) else "" for one in RUNTIMES]
        factor = pace[OURS] / max(pace.get(one, 0.0) for one in RUNTIMES)
        bound = pace[OURS] / float(found[OURS]["share_of_peak"])
        title = NETWORKS.get(name, name).partition(",")[0].partition(" on our")[0]
        lines.append([title, batch, *peers, f"{pace[OURS]:.2f}", times(factor), f"{bound:.1f}"])
    return markdown(header, lines)


def families() -> str:
    """Networks of other libraries and repositories, each against itself."""
    rows = [row for row in read(ZEN4, "families") if row["status"] == "ok"]
    header = ["network", "image", "inference: source", "ours", "speed", "memory", "training step", "memory of a step"]
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        modes = [
            {row["provider"]: row for row in rows if row["network"] == name and row["mode"] == mode}
            for mode in ("inference", "train")
        ]
        source, ours = (modes[0][provider] for provider in ("source", OURS))
        pace = [f"{float(row['images_per_second']):.3g}" for row in (source, ours)]
        speeds = [_gain(found) for found in modes]
        lines.append([name, f"{source['batch']} x {source['image']}", *pace, *speeds[0], *speeds[1]])
    return markdown(header, lines)


def _gain(found: dict[str, Row]) -> list[str]:
    """Speed and memory of ours against the source, where both were measured."""
    if not found:
        return ["", ""]
    source, ours = found["source"], found[OURS]
    memory = float(ours["peak_mebibytes"]) / float(source["peak_mebibytes"])
    return [times(_milliseconds(source) / _milliseconds(ours)), f"{memory:.2f} x"]


def ops() -> str:
    """Ops against the fastest of torch's ways to do the same."""
    header = ["op", "forward", "forward and backward", "peak memory of both, of eager"]
    lines = []
    for title, (name, belongs) in OPS.items():
        here, there = (_cases(processor, name, belongs) for processor in (ZEN4, ZEN5))
        memory = sorted(_memory(rows) for (_, mode), rows in here.items() if mode == "both")
        least, most = f"{memory[0]:.2f}", f"{memory[-1]:.2f}"
        shown = f"{least} x" if least == most else f"{least} to {most} x"
        lines.append([title, *_spans(here), shown, *_spans(there)])
    return markdown([*header, "Zen 5: forward", "forward and backward"], lines)


def _cases(processor: str, name: str, belongs: Callable[[str], bool]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in read(processor, name):
        case, mode = _case_and_mode(row)
        if belongs(case):
            found.setdefault((case, mode), []).append(row)
    return found


def _spans(cases: dict[tuple[str, str], list[Row]]) -> list[str]:
    return [span([_speed(rows) for (_, found), rows in cases.items() if found == mode]) for mode in ("forward", "both")]


def _case_and_mode(row: Row) -> tuple[str, str]:
    """Mode and dtype, with which a case of patch_embed.csv ends."""
    if row.get("mode"):
        return row["case"], row["mode"]
    case, mode, _ = row["case"].rsplit(", ", 2)
    return case, mode


def _speed(rows: Sequence[Row], key: str = "milliseconds") -> float:
    found = {row["provider"]: float(row[key]) for row in rows if row[key]}
    return min(time for provider, time in found.items() if not provider.startswith("ours")) / found["ours"]


def _memory(rows: Sequence[Row]) -> float:
    found = {row["provider"]: float(row.get("peak_mebibytes") or row["peak_megabytes"]) for row in rows}
    return found["ours"] / next(found[name] for name in EAGER if name in found)


def trainings() -> str:
    """Whole trainings: medians over seeds."""
    found: dict[str, list[Row]] = {}
    for row in read(ZEN5, "retokenization"):
        found.setdefault(row["schedule"], []).append(row)
    lines = []
    for schedule, rows in found.items():

        def middle(key: str, rows: list[Row] = rows) -> float:
            return median(float(row[key]) for row in rows)

        full = schedule == "1"
        lines.append([
            "full tokens" if full else schedule,
            rows[0]["phases"], f"{middle('top1'):.1f}", f"{middle('ema_top1'):.1f}",
            f"{middle('train_seconds'):.1f}",
            *(["-"] * 3 if full else [
                f"{100 * middle('time_saved'):.1f} %", f"{100 * middle('flops_saved'):.1f} %", f"{middle('ratio'):.2f}"
            ]),
        ])  # fmt: skip
    header = ["schedule", "phases, epochs:reduction", "top-1", "of the average", "seconds", "time saved", "FLOPs saved"]
    return markdown([*header, "time / FLOPs"], lines)


def detection() -> str:
    """Detectors: COCO's AP in percent, means and standard deviations over seeds."""
    header = [
        "detector",
        "short side in the test",
        "AP",
        "AP50",
        "AP75",
        "AP of masks",
        "parameters",
        "MACs",
        "seconds, least",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    all_rows = read(ZEN3, "detection")
    trained_at = min((row["min_size"] for row in all_rows), key=int)
    for row in all_rows:
        groups.setdefault((row["name"], row["windows"], row["min_size"]), []).append(row)
    lines = []
    for (name, windows, side), rows in groups.items():
        shown = name if side == trained_at else f"&nbsp; the same, {windows} windows"
        figures = [_mean_and_deviation(rows, key) for key in ("ap", "ap50", "ap75", "mask_ap")]
        cost = [f"{float(rows[0]['params']) / 1e6:.2f} M", f"{float(rows[0]['macs']) / 1e9:.2f} G"]
        seconds = min(float(row["train_seconds"]) for row in rows)
        lines.append([shown, side, *figures, *cost, f"{seconds:.0f}"])
    return markdown(header, lines)


def _mean_and_deviation(rows: Sequence[Row], key: str) -> str:
    values = [float(row[key]) for row in rows]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def detection_speed() -> str:
    """Detectors of the same weights, against torchvision's around timm's network."""
    header = ["work", "detector", "seconds", "speed", "peak memory"]
    rows = read(ZEN3, "detection_speed")
    return markdown(
        header,
        [
            [row["work"], row["detector"], f"{float(row['seconds']):.2f}", times(float(row["speed_up"])),
             f"{row['peak_mib']} MiB"]
            for row in rows
        ],
    )  # fmt: skip


SCORES = {  # work: case, the peers of each column
    "value and first derivative, 10 points: length distortion": "order 1, 10 thetas, 224 px",
    "and the second: curvature": "order 2, 10 thetas, 224 px",
    "NTK Gram, 16 images": "NTK Gram, batch 16, 224 px",
}


def scores() -> str:
    """Passes behind the scores, against the fastest of torch.func eager and compiled, and of JAX."""
    lines = []
    for work, case in SCORES.items():
        found = {row["provider"]: _milliseconds(row) for row in read(ZEN4, "scores") if row["case"] == case}
        ours = found.pop("ours")
        del found["reference"]
        line = [work, f"{ours / 1e3:.3f} s"]
        for belongs in ("eager", "compiled", "jax"):
            peer = min(time for name, time in found.items() if belongs in name)
            line.append(f"{peer / 1e3:.2f} s: {times(peer / ours)}")
        lines.append(line)
    return markdown(["work", "ours", "torch.func, eager", "compiled", "JAX"], lines)


CURVES = {  # file: title
    "window_attention_taylor": "attention along curves, float32",
    "gelu_taylor": "GELU along curves, float32",
    "normalization_taylor": "LayerNorm, softmax, tanh, square along curves, float32",
}
OF_TORCH = ("torch.func", "nested torch.func", "vmap")


def _against_torch(rows: Sequence[Row]) -> list[str]:
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


def _derivatives() -> list[list[str]]:
    """Lines of ops along curves and of the passes behind the scores."""
    lines = []
    for file, title in CURVES.items():
        rows = read("h100", file)
        lines.append([f"{title} ({len({row['case'] for row in rows})} cases)", "H100", *_against_torch(rows), "", ""])
    for work, case in SCORES.items():
        rows = [row for row in read("h100", "scores") if row["case"] == case]
        lines.append([work, "H100", *_against_torch(rows), "", ""])
    return lines


def gpus() -> str:
    """What was timed on a GPU, in bfloat16, against the fastest peer: called, and replayed as a CUDA graph."""
    lines = []
    for gpu, title, file, without in (
        ("H100", "window attention, batch 128, of 784 tokens 32", "window_attention", None),
        ("H100", "patch embedding with LayerNorm, batch 128", "patch_embed", None),
        ("H100", "patch merging, batch 128", "patch_merge", None),
        ("H200", "window attention, three axes", "window_attention_volumes", "N="),
    ):
        cases = _cases(gpu.lower(), file, lambda case, without=without: without is None or without not in case)
        counted = len({case for case, _ in cases})
        spans = [
            span([_speed(rows, key) for (_, found), rows in cases.items() if found == mode and rows[0].get(key)])
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
            called = [times(_speed(found)) if found else "" for found in modes]
            lines.append(
                [f"{NETWORKS.get(name, name).split(',')[0]}, batch {batch}", "H100", called[0], "", called[1], ""]
            )
    return markdown(["work", "GPU", "forward", "replayed", "forward and backward", "replayed"], lines)


def summary() -> str:
    """One line for each thing that is made faster: README's table."""
    lines = []
    for title, peer, file, name in (
        ("Swin-T of timm, inference", "timm, its faster way", "models", "swin_tiny_patch4_window7_224"),
        ("As-ViT-S, inference", "plain PyTorch operations", "models", "asvit_small"),
        ("Video Swin-T, inference", "its source", "families", "Video Swin-T"),
        ("MONAI's SwinUNETR 3-D, encoder", "its source", "families", "MONAI SwinUNETR 3-D, encoder"),
    ):
        rows = [row for row in read(ZEN4, file) if row["network"] == name and row["mode"] == "inference"]
        providers = {row["provider"]: row for row in rows if row["milliseconds"]}
        factor = _milliseconds(_fastest(providers, False)) / _milliseconds(providers[OURS])
        lines.append([title, peer, times(factor), "CPU, Zen 4"])
    for title, case in (("length distortion of a network", "order 1, 10 thetas, 224 px"),):
        found = {row["provider"]: _milliseconds(row) for row in read(ZEN4, "scores") if row["case"] == case}
        peer = found["torch.func.jvp, compiled"]
        lines.append([title, "torch.func.jvp, compiled", times(peer / found[OURS]), "CPU, Zen 4"])
    attention = _cases("h100", "window_attention", lambda case: True)
    for title, mode in (("window attention", "forward"), ("and backward", "both")):
        speeds = [_speed(rows) for (_, found), rows in attention.items() if found == mode]
        lines.append([title, "the fastest of SDPA, cuDNN, eager", span(speeds), "H100, bfloat16"])
    swin = [row for row in read("h100", "models") if row["mode"] == "inference" and "swin_tiny" in row["network"]]
    batches = dict.fromkeys(row["batch"] for row in swin)
    speeds = [_speed([row for row in swin if row["batch"] == batch]) for batch in batches]
    lines.append([f"Swin-T of timm, batches of {' and '.join(batches)}", "timm", span(speeds), "H100, bfloat16"])
    rows = [row for row in read(ZEN5, "retokenization") if row["schedule"] == "table6-120"]
    saved = median(float(row["time_saved"]) for row in rows)
    lines.append(["training with coarse tokens first", "full tokens", times(1 / (1 - saved)), "CPU, Zen 5"])
    return markdown(["what", "against", "speed", "on"], lines)


def known() -> str:
    """What ``accelerate`` knows."""
    from asvit_fast.acceleration import families_table

    return families_table().rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "known": known,
    "runtimes": runtimes,
    "networks": networks,
    "families": families,
    "ops": ops,
    "trainings": trainings,
    "detection": detection,
    "detection speed": detection_speed,
    "scores": scores,
    "gpus": gpus,
}


def filled(text: str) -> str:
    """The text with its tables, each between its comments, <!-- NAME --> and <!-- end of NAME -->."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        if not found:
            continue
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{start.strip()} has no {end}")
        text = f"{before}{start}\n{table()}\n\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the files")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(filled(page.read_text()))
    else:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main()
