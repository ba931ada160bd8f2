"""A small COCO folder and trainings on it, for the tests of detection; runs that are killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import asvit_fast as af
from asvit_fast.detection import DetectionResult
from asvit_fast.detection.training import DetectionStep

TOPOLOGY = "8,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"
SIZES = ((48, 64), (64, 48), (40, 56), (64, 64))  # height, width of images
DETECTOR: dict[str, Any] = {
    "representation_size": 16, "mask_layers": (8,), "anchor_sizes": (8, 16, 32, 64, 128), "box_score_thresh": 0.0,
    "box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 20,
    "box_detections_per_img": 10,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "detector": "mask_rcnn", "epochs": 2, "out_channels": 8, "detector_kwargs": DETECTOR, "batch_size": 2,
    "grad_accum_steps": 1, "augmentation": "multiscale", "scales": (32, 64), "min_size": 48, "max_size": 64,
    "workers": 0, "warmup_epochs": 0, "checkpoint_interval": 1, "seed": 3, "device": "cpu", "progress": False,
}  # fmt: skip


def square(box: tuple[int, int, int, int]) -> list[list[float]]:
    left, top, w, h = box
    return [[left, top, left + w, top, left + w, top + h, left, top + h]]


def content(images: int, categories: tuple[int, ...] = (3, 7)) -> dict[str, Any]:
    """Annotations of images with none, one or two bright squares; the ids of the categories have holes."""
    file: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
    }
    for number in range(images):
        height, width = SIZES[number % len(SIZES)]
        file["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for index in range(number % 3):
            box = (4 + 20 * index, 6 + 3 * number % 8, 14 + 2 * index, 16)
            file["annotations"].append(
                {
                    "id": len(file["annotations"]) + 1,
                    "image_id": number,
                    "category_id": categories[index],
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": square(box),
                }
            )
    return file


def write_split(folder: Path, split: str, file: dict[str, Any]) -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(file))
    for image in file["images"]:
        pixels = np.random.default_rng(image["id"]).integers(
            0, 60, (image["height"], image["width"], 3), dtype=np.uint8
        )
        for one in file["annotations"]:
            if one["image_id"] == image["id"]:
                left, top, width, height = map(int, one["bbox"])
                pixels[top : top + height, left : left + width, one["category_id"] % 3] = 250
        Image.fromarray(pixels).save(folder / split / image["file_name"])


def write_coco(folder: Path) -> Path:
    """12 training and 5 validation images."""
    write_split(folder, "train", content(12))
    write_split(folder, "val", content(5))
    return folder


def run(data: str | Path, out: str | Path | None = None, what: Any = TOPOLOGY, **options: Any) -> DetectionResult:
    return af.detection.train(what, str(data) if isinstance(data, Path) else data, out=out, **{**OPTIONS, **options})


def run_killed(data: str, out: str, update: int, options: dict[str, Any]) -> None:
    """Die by SIGKILL before an update of the training."""
    original = DetectionStep.__call__

    def step(self: DetectionStep, batches: Any, passes: int, number: int) -> Any:
        if number == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batches, passes, number)

    DetectionStep.__call__ = step  # type: ignore[method-assign]
    run(data, out, **options)


def main() -> None:
    """Under torchrun: a training whose rows rank 0 prints."""
    import sys

    result = run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result.epochs))


if __name__ == "__main__":
    main()
