"""``asvit-fast export``: a topology or a trained network as files for others: timm, ONNX, torch.export."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..export import Exported, open_network, writer
from ..graph import runtime_installed
from ..settings import EXPORT_FORMATS


def run(values: SimpleNamespace) -> int:
    write = writer(values.format, values.to)
    network = open_network(values.source, values.seed, values.num_classes, values.img_size, values.use_ema)
    target = write(network)
    fresh = f"fresh weights from seed {values.seed}, not trained"
    weights = f"the weights of {network.built.path}" if network.trained else fresh
    print(f"Wrote {' and '.join(EXPORT_FORMATS[values.format])} to {target} ({weights}).")
    print(f"network:      {size(network)}")
    print(f"images:       {images(network.built.data_config())}")
    for line in how_to_load(values.format, target):
        print(line)
    return 0


def size(network: Exported) -> str:
    """Parameters, and what the run promised of them."""
    classes = network.built.options.get("num_classes", 1000)
    count = f"{network.built.name}, {network.parameters:,} parameters, {classes} classes"
    if network.limit is None:
        return count
    if network.parameters <= network.limit:
        return f"{count} (the run allowed {network.limit:,.0f})"
    return (
        f"{count}: MORE than the {network.limit:,.0f} that the run allowed, which it counted otherwise (image size, "
        "classes, or without the position embedding)"
    )


def images(config: dict[str, Any]) -> str:
    channels, height, width = config["input_size"]
    mean, std = (",".join(f"{value:g}" for value in config[name]) for name in ("mean", "std"))
    return (
        f"{channels} x {height} x {width}, crop {config['crop_pct']:g} {config['crop_mode']}, "
        f"{config['interpolation']}, mean {mean}, std {std}"
    )


def how_to_load(format: str, target: Any) -> list[str]:
    if format == "onnx":
        run, not_run = (
            "run in ONNX Runtime: the same outputs as torch's",
            "not run: pip install onnxruntime, and export again",
        )
        checked = run if runtime_installed() else not_run
        return [f"checked:      {checked}", f"load it:      onnxruntime.InferenceSession('{target}/model.onnx')"]
    if format == "exported":
        return [f"load it:      model = torch.export.load('{target}/model.pt2').module()  # needs torch alone"]
    return [
        "load it:      import asvit_fast, timm",
        f"              model = timm.create_model('local-dir:{target}', pretrained=True)",
    ]
