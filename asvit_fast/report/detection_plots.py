"""The pictures of a detector's training: what it found beside the truth, and the images that it fails on, as PNG
bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from ..detection.coco import CocoImages, ImageEntry, coco_masks, drop_crowds, mask_of, open_coco, run_lengths
from ..detection.pictures import draw
from ..detection.training import DETECTIONS
from ..errors import InputError
from ..files import from_json
from ..images import UnreadableImage
from ..runs import Run
from .plots import STYLE, png

SHOWN = 6  # images
LEAST_SCORE = 0.5  # of what counts as found
LEAST_OVERLAP = 0.5  # IoU of a right answer
Results = dict[int, list[dict[str, Any]]]  # of the images by their ids


def pictures(run: Run) -> dict[str, bytes]:
    """Detections of the last validation beside the truth, spread over the images, and those of the hardest images; {}
    where the run has no detections, or its images are gone."""
    try:
        truth = _truth(run)
        found = _found(run, truth)
    except InputError:
        return {}
    entries = [entry for entry in truth.images if drop_crowds(entry.objects)]
    if not found or not entries:
        return {}
    spread = [entries[index * len(entries) // min(SHOWN, len(entries))] for index in range(min(SHOWN, len(entries)))]
    scores = {entry.id: f1_score(entry, found.get(entry.id, []), truth) for entry in entries}
    hardest = sorted(entries, key=lambda entry: (scores[entry.id], -len(entry.objects), entry.id))[:SHOWN]
    chosen = {"detect_examples.png": spread, "detect_hardest.png": hardest}
    return {name: _grid(truth, images, found, scores) for name, images in chosen.items()}


def f1_score(entry: ImageEntry, results: Sequence[dict[str, Any]], truth: CocoImages) -> float:
    """2 TP / (2 TP + FP + FN) of an image, from 0 to 1: what was found with a score of 0.5 and more, of the right
    class and an IoU of 0.5 and more, the best first."""
    results = _confident(results)
    objects = drop_crowds(entry.objects)
    free = list(range(len(objects)))
    boxes = torch.tensor([one.box for one in objects]).reshape(-1, 4)  # [n, 4]
    overlaps = box_iou(_boxes(results), boxes)  # [found, n]
    right = 0
    for row, result in zip(overlaps, results, strict=True):
        same = [index for index in free if truth.categories[objects[index].label - 1][0] == result["category_id"]]
        best = max(same, key=lambda index: float(row[index]), default=None)
        if best is not None and row[best] >= LEAST_OVERLAP:
            free.remove(best)
            right += 1
    return 2 * right / max(len(results) + len(objects), 1)


def _truth(run: Run) -> CocoImages:
    masks = "mask" in run.config["model"]["detector"]
    return open_coco(run.config["data"], run.config["recipe"]["val_split"], masks)


def _found(run: Run, truth: CocoImages) -> Results:
    path = Path(run.directory) / DETECTIONS
    if not path.is_file():
        return {}
    known = {entry.id for entry in truth.images}
    found: Results = {}
    for one in from_json(path.read_bytes()):
        if isinstance(one, dict) and one.get("image_id") in known:
            found.setdefault(one["image_id"], []).append(one)
    return found


def _confident(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((one for one in results if one["score"] >= LEAST_SCORE), key=lambda one: -one["score"])


def _boxes(results: Sequence[dict[str, Any]]) -> Tensor:
    """[n, 4]: left, top, right, bottom."""
    boxes = torch.tensor([one["bbox"] for one in results], dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _grid(truth: CocoImages, entries: Sequence[ImageEntry], found: Results, scores: dict[int, float]) -> bytes:
    """The truth above, what was found below; an image that cannot be read stays empty."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * len(entries), 5.4), layout="constrained")
        axes = figure.subplots(2, len(entries), squeeze=False)
        for column, entry in enumerate(entries):
            above, below = axes[0, column], axes[1, column]
            above.set_title(f"{entry.path.name}: truth", fontsize=10)
            below.set_title(f"found: F1 {scores[entry.id]:.2f}", fontsize=10)
            try:
                image, _ = truth[truth.images.index(entry)]
            except UnreadableImage:
                continue
            above.imshow(np.asarray(draw(image, _true_objects(entry, truth), truth.class_names)))
            results = _confident(found.get(entry.id, []))
            below.imshow(np.asarray(draw(image, _found_objects(entry, results, truth), truth.class_names)))
        for one in axes.flat:
            one.set_axis_off()
        return png(figure, photographs=True)


def _true_objects(entry: ImageEntry, truth: CocoImages) -> dict[str, Tensor]:
    objects = drop_crowds(entry.objects)
    shown = {
        "boxes": torch.tensor([one.box for one in objects]).reshape(-1, 4),
        "labels": torch.tensor([one.label for one in objects], dtype=torch.int64),
    }
    if truth.masks and objects:
        masks = [mask_of(one.entry, entry.height, entry.width) for one in objects]
        shown["masks"] = torch.from_numpy(np.stack(masks)).bool()  # [n, H, W]
    return shown


def _found_objects(entry: ImageEntry, results: Sequence[dict[str, Any]], truth: CocoImages) -> dict[str, Tensor]:
    labels = {number: label for label, (number, _) in enumerate(truth.categories, start=1)}
    shown = {
        "boxes": _boxes(results),
        "labels": torch.tensor([labels[one["category_id"]] for one in results], dtype=torch.int64),
        "scores": torch.tensor([one["score"] for one in results]),
    }
    if truth.masks and results:
        lengths = [run_lengths(one["segmentation"], entry.height, entry.width) for one in results]
        shown["masks"] = torch.from_numpy(coco_masks().decode(lengths)).permute(2, 0, 1).bool()  # [n, H, W]
    return shown
