"""``asvit-fast detect eval``: COCO's average precision of a trained detector."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .. import processes
from ..backends import rank_device
from ..detection import DetectionEvaluation, TrainedDetector, evaluate_detector, load_detector, open_coco
from ..detection.data import DetectionLoader, DetectionPrefetcher, make_reader
from ..errors import InputError
from ..files import to_json, write_atomic
from ..recipe import DetectionRecipe
from ..run_directory import AP_MEASURES, MASK
from ..what import resolve
from .common import is_main_process, print_on_main

LABELS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # of these measures, as papers have them


def run(values: SimpleNamespace) -> int:
    check_results_file(values.results)
    device = rank_device(values.device)
    loaded = load_detector(resolve(values.checkpoint).trained, values.use_ema, values.windows)
    resize(loaded, values.min_size, values.max_size)
    ranks = processes.init_process_group(device)
    started = time.perf_counter()
    found = measure(values, loaded, device, ranks)
    result = {
        "checkpoint": str(loaded.path),
        "model": loaded.name,
        "detector": loaded.detector,
        **found.to_dict(),
        "min_size": loaded.model.transform.min_size[-1],
        "max_size": loaded.model.transform.max_size,
        "use_ema": values.use_ema,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if is_main_process():
        if values.results is not None:
            write_atomic(values.results, to_json(found.detections))
        show(values, result)
    return 0


def check_results_file(path: str | None) -> None:
    """Raise InputError, before any work, for a file that cannot be written."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"results {path!r} cannot be written: give a file in a folder that exists and can be written")


def resize(loaded: TrainedDetector, min_size: int | None, max_size: int | None) -> None:
    """Test at another size of images."""
    transform: Any = loaded.model.transform
    transform.min_size = transform.min_size if min_size is None else (min_size,)
    transform.max_size = transform.max_size if max_size is None else max_size
    if transform.max_size < transform.min_size[-1]:
        raise InputError(
            f"max_size must be min_size ({transform.min_size[-1]}) or more, got {transform.max_size}; give both"
        )


def measure(values: SimpleNamespace, loaded: TrainedDetector, device: torch.device, ranks: int) -> DetectionEvaluation:
    """The detector on the images that the options name."""
    recipe = DetectionRecipe.of(**({} if values.workers is None else {"workers": values.workers}))
    truth = open_coco(values.data, values.split, loaded.model.has_masks)
    if truth.warning:
        print_on_main(truth.warning, values.quiet or values.json)
    if truth.categories != loaded.categories:
        raise InputError(
            f"{truth.source} has other categories than the detector ({len(truth.categories)}, not "
            f"{len(loaded.categories)}, or other ids or names); give the data that it was trained for"
        )
    loader = DetectionLoader(truth, make_reader(recipe, device, processes.rank(), ranks), len(truth.categories), False)
    amp = functools.partial(torch.autocast, device.type, dtype=getattr(torch, values.amp_dtype))
    return evaluate_detector(
        loaded.model.to(device),
        DetectionPrefetcher(device)(loader(0, 0, loader.images, 1)),
        truth,
        loaded.model.has_masks,
        autocast=amp if values.amp else contextlib.nullcontext,
        ranks=ranks,
        progress=not values.quiet and not values.json and is_main_process(),
    )


def show(values: SimpleNamespace, result: dict[str, Any]) -> None:
    if values.json:
        print(to_json(result))
        return
    print_on_main(
        f"{result['detector']} on {result['model']} of {result['checkpoint']}, {result['images']} images of "
        f"{values.data}, short side {result['min_size']}, at most {result['max_size']} pixels, percent:",
        values.quiet,
    )
    for kind, prefix in (("boxes", ""), ("masks", MASK)):
        if f"{prefix}ap" in result:
            named = zip(LABELS, AP_MEASURES, strict=True)
            parts = (f"{label} {result[prefix + name]:.2f}" for label, name in named if prefix + name in result)
            print(f"{kind}: {' '.join(parts)}")
