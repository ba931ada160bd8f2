"""Tables of whole networks: inference and training steps."""

from __future__ import annotations

from .rows import OURS, PROCESSORS, ZEN3, ZEN4, ZEN5, Row, fastest, markdown, milliseconds, read, times

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


def networks() -> str:
    """Inference and training steps of networks, against the fastest way in which the source runs; beside them the
    speeds that earlier kernels had on other processors."""
    header = ["network", "inference: source", "ours", "speed", "training step", "memory of a step"]
    lines = []
    for case, title in NETWORKS.items():
        inference, train = _of_network(ZEN4, case, "inference"), _of_network(ZEN4, case, "train")
        memory = float(train[OURS]["peak_mebibytes"]) / float(train["source"]["peak_mebibytes"])
        others = [_speeds(processor, case) for processor in (ZEN3, ZEN5)]
        lines.append([title, *_comparison(inference, train), f"{memory:.2f} x", *others])
        if f"{OURS}-compiled" in inference:
            lines.append(["&nbsp; both compiled", *_comparison(inference, train, "-compiled"), "", "", ""])
    return markdown([*header, "Zen 3, earlier: inference, step", "Zen 5, earlier"], lines)


def _of_network(processor: str, case: str, mode: str) -> dict[str, Row]:
    rows = read(processor, "models")
    return {row["provider"]: row for row in rows if row["network"] == case and row["mode"] == mode}


def _comparison(inference: dict[str, Row], train: dict[str, Row], compiled: str = "") -> list[str]:
    """Images per second of source and ours, the speed of inference and of a training step."""
    source, ours = fastest(inference, bool(compiled)), inference[OURS + compiled]
    pace = [f"{float(row['images_per_second']):.1f}" for row in (source, ours)]
    factors = [
        milliseconds(fastest(found, bool(compiled))) / milliseconds(found[OURS + compiled])
        for found in (inference, train)
    ]
    return [*pace, *map(times, factors)]


def _speeds(processor: str, case: str) -> str:
    found = [_of_network(processor, case, mode) for mode in ("inference", "train")]
    return ", ".join(times(milliseconds(fastest(one, False)) / milliseconds(one[OURS])) for one in found)


RUNTIMES = {  # of a precision that a network is run in: providers, by column
    "fp32": {"source": "source", "compiled": "compiled", "onnxruntime": "ONNX Runtime", "openvino-f32": "OpenVINO"},
    "bf16": {"source": "source", "compiled": "compiled", "openvino": "OpenVINO"},
}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def runtimes() -> str:
    """Inference in images per second against what else people take on a CPU, and what its products alone allow."""
    header = [
        "network",
        "batch",
        "numbers",
        *RUNTIMES["fp32"].values(),
        OURS,
        "ours, compiled",
        "against the best",
        "products alone allow",
    ]
    lines = [line for processor in (ZEN4, ZEN3) for line in _runtimes(processor)]
    return markdown([*header, "on"], lines)


def _runtimes(processor: str) -> list[list[str]]:
    rows = [row for row in read(processor, "runtimes") if row["mode"] == "inference"]
    lines = []
    for case in dict.fromkeys((row["network"], row["batch"], row["precision"]) for row in rows):
        name, batch, precision = case
        found = {row["provider"]: row for row in rows if (row["network"], row["batch"], row["precision"]) == case}
        names = {title: provider for provider, title in RUNTIMES[precision].items()}
        if processor == ZEN3:  # which has no other products than float32's
            names["OpenVINO"] = "openvino"
        pace = {provider: float(row["images_per_second"] or 0) for provider, row in found.items()}
        peers = {title: pace.get(names.get(title, ""), 0.0) for title in RUNTIMES["fp32"].values()}
        bound = pace[OURS] / float(found[OURS]["share_of_peak"])
        title = NETWORKS.get(name, name).partition(",")[0].partition(" on our")[0]
        ours = (pace[OURS], pace.get(f"{OURS}-compiled", 0.0))
        shown = [f"{value:.2f}" if value else "" for value in (*peers.values(), *ours)]
        factor = times(max(ours) / max(peers.values()))
        lines.append([title, batch, PRECISIONS[precision], *shown, factor, f"{bound:.1f}", PROCESSORS[processor]])
    return lines


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
    return [times(milliseconds(source) / milliseconds(ours)), f"{memory:.2f} x"]
