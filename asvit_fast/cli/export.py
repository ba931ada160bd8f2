"""``asvit-fast export``: a topology or a trained network as a folder that timm loads."""

from __future__ import annotations

from types import SimpleNamespace

from .common import IMG_SIZE
from .options import Command, Option, flag, integer, seed, text


def run(values: SimpleNamespace) -> int:
    from ..export import export, is_trained

    target = export(
        values.source,
        values.to,
        seed=values.seed,
        num_classes=values.num_classes,
        img_size=values.img_size,
        use_ema=values.use_ema,
    )
    weights = "trained" if is_trained(values.source) else f"fresh weights from seed {values.seed}, not trained"
    print(f"Wrote config.json and model.safetensors to {target} ({weights}).")
    print("load it:      import asvit_fast, timm")
    print(f"              model = timm.create_model('local-dir:{target}', pretrained=True)")
    return 0


COMMAND = Command(
    name="export",
    summary="Write a topology or a trained network as a folder that timm.create_model('local-dir:...') loads.",
    options=(
        Option(
            "source",
            text,
            None,
            "run directory of search or scale (its final topology) or a topology string: fresh weights; run directory "
            "or checkpoint of a training: trained ones",
            positional=True,
            required=True,
        ),
        Option("to", text, None, "folder to write, new or empty or an earlier export", "DIR", required=True),
        Option("seed", seed, 0, "seed (a whole number) of the weights", "N"),
        Option("num_classes", integer(0), 1000, "number of outputs of the classifier; 0 = none", "N"),
        IMG_SIZE,
        Option("use_ema", flag, False, "of a training, the moving average of the weights", flag=True),
    ),
    run=run,
    epilog="example: asvit-fast export runs/scale --to model",
)
