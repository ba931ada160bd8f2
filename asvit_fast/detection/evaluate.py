"""Average precision of a detector, by pycocotools: COCO's numbers, in percent."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from .. import processes
from ..errors import InputError
from ..modes import evaluation_mode
from ..run_directory import AP_MEASURES, MASK
from .coco import CocoImages, ImageEntry, coco_masks, run_lengths
from .data import Batch

KINDS = {"bbox": "", "segm": MASK}  # COCOeval's name -> the prefix of ours
MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class DetectionEvaluation:
    """COCO's measures in percent and what they are of.

    ``measures``: ap, ap50, ap75, ap_small, ap_medium, ap_large, and of masks mask_ap, ...; those of a size that no
    object has are left out. ``detections``: every detection in COCO's format of results.
    """

    images: int
    measures: dict[str, float]
    detections: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of numbers."""
        return {"images": self.images, **self.measures}


def evaluate_detector(
    model: nn.Module,
    batches: Iterable[Batch],
    truth: CocoImages,
    masks: bool,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ranks: int = 1,
    progress: bool = False,
) -> DetectionEvaluation:
    """Run a detector over images in evaluation mode and measure it.

    Args:
        model: a ``Detector``, or one that is sharded.
        batches: this rank's share of the images of ``truth``, with their ids.
        truth: what is in the images.
        masks: measure masks, too.
        autocast: makes the context of each forward pass.
        ranks: number of processes that evaluate together; every one gets the result of all.
        progress: show a progress bar, where stderr is a terminal.

    Raises:
        InputError: no images on any rank, or pycocotools is not installed.
    """
    coco_masks()
    context = autocast or contextlib.nullcontext
    found: dict[int, list[dict[str, Any]]] = {}  # by image: the next one takes the place of what cannot be read
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        bar = tqdm(batches, desc="evaluating", unit=" batches", leave=False, disable=None if progress else True)
        for images, targets in bar if not _sharded(model, ranks) else _in_step(bar, device):
            with context():
                outputs = model(images)
            for target, output in zip(targets, outputs, strict=True):
                if target["image_id"] is not None:
                    found[target["image_id"]] = to_results(output, target["image_id"], truth.categories)
    for others in processes.gather(found) if ranks > 1 else []:
        found |= others
    if not found:
        raise InputError("there are no images to evaluate; give other data")
    results = [one for number in sorted(found) for one in found[number]]
    measures = processes.run_on_rank0(lambda: measure(results, truth, set(found), masks))
    return DetectionEvaluation(len(found), measures, results)


def _sharded(model: nn.Module, ranks: int) -> bool:
    return ranks > 1 and isinstance(model, FSDPModule)


def _in_step(batches: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
    """A rank without images left repeats an uncounted one: a sharded network runs on all ranks or on none."""
    remaining = iter(batches)
    blank: Batch = ([torch.zeros(3, 32, 32, device=device)], [{"image_id": None}])
    while True:
        batch = next(remaining, None)
        if not any(processes.gather(batch is not None)):
            return
        yield batch or blank


def to_results(output: dict[str, Tensor], image_id: int, categories: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """What was found in an image, in COCO's format of results: boxes as left, top, width, height, masks as run
    lengths."""
    boxes = output["boxes"].float().cpu().clone()  # [n, 4]
    boxes[:, 2:] -= boxes[:, :2]
    scores, labels = output["scores"].tolist(), output["labels"].tolist()
    results = [
        {"image_id": image_id, "category_id": categories[label - 1][0], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), labels, scores, strict=True)
    ]
    if "masks" in output:
        inside = (output["masks"][:, 0] > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()  # [n, H, W]
        for one, mask in zip(results, inside, strict=True):
            lengths = coco_masks().encode(np.asfortranarray(mask))
            one["segmentation"] = {"size": list(mask.shape), "counts": lengths["counts"].decode()}
    return results


# --------------------------------------------------------------------------- pycocotools


def measure(results: Sequence[dict[str, Any]], truth: CocoImages, image_ids: set[int], masks: bool) -> dict[str, float]:
    """COCO's measures of results in percent, over the images of these ids."""
    from pycocotools.cocoeval import COCOeval

    images = [entry for entry in truth.images if entry.id in image_ids]
    measures: dict[str, float] = {}
    for kind, prefix in KINDS.items() if masks else (("bbox", ""),):
        annotations = [annotation for entry in images for annotation in _truth_of(entry, kind)]
        found = [_result(one, kind) for one in results if one["image_id"] in image_ids]
        with contextlib.redirect_stdout(io.StringIO()):  # it reports on its progress there
            evaluation = COCOeval(_coco(images, annotations, truth), _coco(images, found, truth), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = dict(zip(AP_MEASURES, evaluation.stats[: len(AP_MEASURES)].tolist(), strict=True))
        measures |= {prefix + name: 100 * value for name, value in values.items() if value >= 0}  # -1: no such object
    return measures


def _truth_of(entry: ImageEntry, kind: str) -> Iterable[dict[str, Any]]:
    for one in entry.objects:
        annotation: dict[str, Any] = {
            "image_id": entry.id,
            "category_id": one.entry["category_id"],
            "bbox": list(one.entry["bbox"]),
            "iscrowd": int(one.crowd),
        }
        area = one.entry.get("area")
        if kind == "segm":
            annotation["segmentation"] = run_lengths(one.entry["segmentation"], entry.height, entry.width)
            area = coco_masks().area(annotation["segmentation"]) if area is None else area
        left, top, right, bottom = one.box
        yield {**annotation, "area": float((right - left) * (bottom - top) if area is None else area)}


def _result(one: dict[str, Any], kind: str) -> dict[str, Any]:
    """A result as COCOeval wants it, its size for the measures of sizes."""
    area = one["bbox"][2] * one["bbox"][3] if kind == "bbox" else float(coco_masks().area(one["segmentation"]))
    return {**one, "area": area, "iscrowd": 0}


def _coco(images: Sequence[ImageEntry], annotations: Sequence[dict[str, Any]], truth: CocoImages) -> Any:
    """An index of pycocotools; annotations get ids from 1, as it takes 0 for no match."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": entry.id, "height": entry.height, "width": entry.width} for entry in images],
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in truth.categories],
    }
    coco.createIndex()
    return coco
