"""``asvit-fast train``: train a network, coarse tokens first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..errors import InputError
from ..recipe import Recipe
from .common import QUIET, WHAT, check_output_folder, print_on_main
from .options import Command, Option, chosen, image_size, integer, keywords, options_of, text


def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    from ..training import train

    print_on_main(f"Writing to {values.out}; stop at any time, the same command continues.", values.quiet)
    result = train(
        data=values.data,
        schedule=values.schedule,
        epochs=values.epochs,
        out=values.out,
        img_size=values.img_size,
        num_classes=values.num_classes,
        **{"initial_checkpoint": values.initial_checkpoint, **network(values)},
        resume=values.resume,
        device=values.device,
        progress=not values.quiet,
        **chosen(values, Recipe),
    )
    conclude(values, result)
    return 0


def network(values: SimpleNamespace) -> dict[str, Any]:
    """The network's part of the arguments of ``train``: with weights, it starts from these."""
    from ..what import resolve

    target = resolve(values.what, to_train=True)
    if target.weights is None:
        return {"model": target.fresh, "model_kwargs": values.model_kwargs}
    if values.initial_checkpoint:
        raise InputError(f"{values.what} has weights of its own: leave out --initial-checkpoint, or give a name")
    built = target.load()
    own = {name: value for name, value in built.options.items() if name not in ("img_size", "num_classes")}
    kwargs = {**own, **(values.model_kwargs or {})}
    return {"model": built.name, "model_kwargs": kwargs, "initial_checkpoint": str(built.path)}


def conclude(values: SimpleNamespace, result) -> None:
    best = result.best
    if best is not None:
        found = "" if best.get("ema_top1") is None else f", {best['ema_top1']:.2f} % of the averaged weights"
        print_on_main(f"Best top-1 {best['top1']:.2f} %{found}, after epoch {best['epoch']}.", values.quiet)
    print_on_main(f"look at it:   asvit-fast report {values.out}", values.quiet)
    print_on_main(f"load in timm: asvit-fast export {values.out} --to model", values.quiet)
    print_on_main(f"validate:     asvit-fast eval {values.out} --data {values.data}", values.quiet)


COMMAND = Command(
    name="train",
    summary="Train a network, coarse tokens first (progressive re-tokenization); also under torchrun.",
    options=(
        Option(
            "what",
            text,
            None,
            WHAT,
            positional=True,
            required=True,
        ),
        Option("data", text, None, "folder of images, a subfolder per class in train/ and val/", "DIR", required=True),
        Option("out", text, None, "run directory, made or continued", "DIR", required=True),
        Option(
            "schedule",
            text,
            "1",
            "epochs:reduction of tokens per side, 40:4,30:2,230:1; fractions, 0.3:4,0.7:1; table6-40, -80, -120; "
            "1 = full tokens",
            "TEXT",
        ),
        Option("epochs", integer(1), 300, "epochs of the whole training; a run may go on with more", "N"),
        Option("img_size", image_size, 224, "image size in pixels: a side, or HEIGHTxWIDTH", "PIXELS"),
        Option("num_classes", integer(1), None, "number of classes; without it, as many as the data has", "N"),
        Option(
            "model_kwargs",
            keywords,
            None,
            "further arguments of the network: --model-kwargs attn_scale=true; may be repeated",
            "NAME=VALUE",
            repeated=True,
        ),
        Option("initial_checkpoint", text, "", "weights to start from, in timm's format", "FILE"),
        Option("resume", text, "", "checkpoint of timm's train.py whose training this one continues", "FILE"),
        Option("device", text, None, "where to compute: cpu, cuda, ...; without it, cuda if there is one", "NAME"),
        *options_of(Recipe),
        QUIET,
    ),
    run=run,
    epilog="example: asvit-fast train asvit_small --data imagenet/ --schedule 40:4,30:2,230:1 --out runs/train",
    resumable=True,
)
