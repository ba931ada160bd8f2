"""``asvit-fast eval``: accuracy and loss of a trained network."""

from __future__ import annotations

import contextlib
import functools
import time
from types import SimpleNamespace
from typing import Any

import torch

from .. import processes
from ..backends import notify_once, rank_device
from ..errors import InputError
from ..files import to_json
from ..models.library import takes_size
from ..recipe import Recipe
from ..training.build import CheckpointModel, build_from_checkpoint
from ..training.data import Reader, load_validation
from ..training.evaluate import Evaluation, evaluate
from ..training.token_reduction import set_token_reduction
from ..what import resolve
from .common import is_main_process, print_on_main


def run(values: SimpleNamespace) -> int:
    device = rank_device(values.device)
    where = values.checkpoint if values.model else resolve(values.checkpoint).trained
    kwargs = dict(values.model_kwargs)
    if values.model and values.img_size is not None and takes_size(values.model):
        kwargs.setdefault("img_size", values.img_size)
    built = build_from_checkpoint(where, values.model, kwargs, values.num_classes, values.use_ema)
    config = built.data_config(
        values.img_size, values.crop_pct, values.interpolation, values.crop_mode, values.mean, values.std
    )
    ranks = processes.init_process_group(device)
    started = time.perf_counter()
    found = measure(values, built, config, device, ranks)
    result = {
        "checkpoint": str(built.path),
        "model": built.name,
        **found.to_dict(),
        "img_size": list(config["input_size"][1:]),
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        "interpolation": config["interpolation"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "token_reduction": values.token_reduction,
        "use_ema": values.use_ema,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if is_main_process():
        show(values, result)
    return 0


def measure(
    values: SimpleNamespace, built: CheckpointModel, config: dict[str, Any], device: torch.device, ranks: int
) -> Evaluation:
    """The network on the images that the options name."""
    recipe = Recipe.of(
        dataset=values.dataset,
        val_split=values.split,
        class_map=values.class_map,
        **({} if values.workers is None else {"workers": values.workers}),
        **{name: config[name] for name in ("crop_pct", "crop_mode", "interpolation")},
    )
    channels, height, width = config["input_size"]
    size = (height, width)
    reader = Reader(recipe, size, device, processes.rank(), ranks, channels, config["mean"], config["std"])
    images = load_validation(values.data, reader)
    check_classes(built, images, bool(values.class_map))
    prepare(built, size, values.token_reduction)
    amp = functools.partial(torch.autocast, device.type, dtype=getattr(torch, values.amp_dtype))
    return evaluate(
        built.model.to(device),
        images.batches(values.batch_size),
        device,
        autocast=amp if values.amp else contextlib.nullcontext,
        ranks=ranks,
        progress=not values.quiet and not values.json and is_main_process(),
    )


def check_classes(built: CheckpointModel, images: Any, mapped: bool) -> None:
    """The numbers of the classes mean the same only if there are as many, and of the same names where the network knows
    them, or if a map says what they mean."""
    classes = images.num_classes
    outputs = getattr(built.model, "num_classes", classes)
    known, found = built.label_names, images.class_names
    named = [name for name in known if name] if isinstance(known, (list, tuple)) else []
    trained_on_fewer = found is not None and named == list(found)  # the other outputs have no images at all
    if classes > outputs or (classes < outputs and not mapped and not trained_on_fewer):
        raise InputError(
            f"the network has {outputs} classes, the images {classes}; give the images of all its classes, "
            "or --class-map with its class of each folder"
        )
    if mapped or not isinstance(known, (list, tuple)) or found is None or list(known) == list(found):
        return
    number = next((n for n, pair in enumerate(zip(known, found, strict=False)) if pair[0] != pair[1]), None)
    if number is not None:
        notify_once(
            ("classes", built.path),
            f"the images' class {number} is {found[number]!r}, the network's is {known[number]!r}: counted by number",
        )


def prepare(built: CheckpointModel, size: tuple[int, int], token_reduction: int) -> None:
    """Fit the network to the images, and to fewer tokens when asked for."""
    built.fit_to(size)
    if token_reduction != 1:
        set_token_reduction(built.model, token_reduction)


def show(values: SimpleNamespace, result: dict[str, Any]) -> None:
    if values.json:
        print(to_json(result))
        return
    height, width = result["img_size"]
    print_on_main(
        f"{result['model']} of {result['checkpoint']} on {result['images']} images of {values.data}, {height}x{width} "
        f"pixels, crop {result['crop_pct']:g}, {result['interpolation']}:",
        values.quiet,
    )
    top1, top5 = result["top1"], result["top5"]
    print(f"Acc@1 {top1:.3f} ({100 - top1:.3f}) Acc@5 {top5:.3f} ({100 - top5:.3f}) Loss {result['loss']:.4f}")
