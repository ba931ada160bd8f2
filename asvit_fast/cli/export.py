"""``asvit-fast export``: a topology or a trained network as files for others: timm, ONNX, torch.export."""

from __future__ import annotations

from types import SimpleNamespace

from ..export import Exported, open_network, writer
from ..graph import runtime_installed
from ..model_card import CARD, how_to_load, images_text
from ..settings import EXPORT_FORMATS

NOT_RUN = "not run: pip install onnxruntime, and export again"


def run(values: SimpleNamespace) -> int:
    write = writer(values.format, values.to, values.push_to_hub)
    network = open_network(values.source, values.seed, values.num_classes, values.img_size, values.use_ema)
    target = write(network)
    fresh = f"fresh weights from seed {values.seed}, not trained"
    taken = f"the weights of {network.built.path}"
    weights = taken if network.trained else f"{taken}, not trained" if network.earlier else fresh
    print(f"Wrote {', '.join((*EXPORT_FORMATS[values.format], CARD))} to {target} ({weights}).")
    print(f"network:      {size(network)}")
    print(f"images:       {images_text(network.built.data_config())}")
    if values.format == "onnx":
        ran = "the same outputs in ONNX Runtime as in torch" if runtime_installed() else NOT_RUN
        print(f"checked:      {ran}")
    for number, line in enumerate(how_to_load(values.format, target)):
        print(f"{'' if number else 'load it:':14}{line}")
    if values.push_to_hub:
        print(f"uploaded:     timm.create_model('hf-hub:{values.push_to_hub}', pretrained=True)")
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
