"""``asvit-fast export``: a topology or a trained network as files for others: timm, ONNX, torch.export."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .common import WHAT
from .options import Command, Option, choice, flag, image_size, integer, seed, text

FORMATS = ("timm", "onnx", "exported")


def run(values: SimpleNamespace) -> int:
    from ..export import files_of, open_network, writer

    write = writer(values.format, values.to)
    network = open_network(values.source, values.seed, values.num_classes, values.img_size, values.use_ema)
    target = write(network)
    fresh = f"fresh weights from seed {values.seed}, not trained"
    weights = f"the weights of {network.built.path}" if network.trained else fresh
    print(f"Wrote {' and '.join(files_of(values.format))} to {target} ({weights}).")
    print(f"network:      {size(network)}")
    print(f"images:       {images(network.built.data_config())}")
    for line in how_to_load(values.format, target):
        print(line)
    return 0


def size(network: Any) -> str:
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
    return (
        f"{channels} x {height} x {width}, crop {config['crop_pct']:g} {config['crop_mode']}, "
        f"{config['interpolation']}, mean {listed(config['mean'])}, std {listed(config['std'])}"
    )


def listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def how_to_load(format: str, target: Any) -> list[str]:
    if format == "onnx":
        from ..graph import runtime_installed

        checked = (
            "run in ONNX Runtime: the same outputs as torch's"
            if runtime_installed()
            else ("not run: pip install onnxruntime, and export again")
        )
        return [f"checked:      {checked}", f"load it:      onnxruntime.InferenceSession('{target}/model.onnx')"]
    if format == "exported":
        return [f"load it:      model = torch.export.load('{target}/model.pt2').module()  # needs torch alone"]
    return [
        "load it:      import asvit_fast, timm",
        f"              model = timm.create_model('local-dir:{target}', pretrained=True)",
    ]


COMMAND = Command(
    name="export",
    summary="Write a topology or a trained network for timm.create_model('local-dir:...'), ONNX or torch.export.",
    options=(
        Option(
            "source",
            text,
            None,
            WHAT,
            positional=True,
            required=True,
        ),
        Option("to", text, None, "folder to write, new or empty or an earlier export", "DIR", required=True),
        Option("format", choice(*FORMATS), "timm", f"one of {', '.join(FORMATS)}", "NAME"),
        Option("seed", seed, 0, "seed (a whole number) of fresh weights", "N"),
        Option(
            "num_classes", integer(0), None, "number of outputs, 0 = none; without it the training's, else 1000", "N"
        ),
        Option(
            "img_size",
            image_size,
            None,
            "image size in pixels: a side, or HEIGHTxWIDTH; without it the run's, else 224",
            "PIXELS",
        ),
        Option("use_ema", flag, False, "of a training, the moving average of the weights", flag=True),
    ),
    run=run,
    epilog="example: asvit-fast export runs/scale --to model\n"
    "         asvit-fast export runs/train --to model --format onnx",
)
