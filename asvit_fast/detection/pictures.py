"""Detections as pictures: boxes, masks, classes and scores drawn into images."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .detectors import Detector

LEAST_SIDE = 480  # pixels of a picture's short side: text on a smaller one cannot be read
LARGEST_SIDE = 4096  # pixels of the long side of an enlarged picture
MASK_ALPHA = 0.45
TURN = 0.618033988749895  # of the colour wheel, from a class to the next: neighbours differ most


def detect(model: Detector, image: Image.Image, device: torch.device, least_score: float = 0.0) -> dict[str, Tensor]:
    """What a detector in evaluation mode finds in an image, on the CPU: boxes [n, 4], labels [n], scores [n], best
    first, and masks [n, H, W] of bool where it has some."""
    pixels = pil_to_tensor(image).to(device, torch.float32) / 255  # [3, H, W]
    with torch.no_grad():
        output = model([pixels])[0]
    kept = output["scores"] >= least_score
    found = {name: value[kept].cpu() for name, value in output.items()}
    if "masks" in found:
        found["masks"] = found["masks"][:, 0] > 0.5
    return found


def draw(image: Image.Image, objects: dict[str, Tensor], names: Sequence[str]) -> Image.Image:
    """An image with objects in it, enlarged where it is small.

    ``objects``: boxes [n, 4] in pixels, labels [n] from 1, and where there are some scores [n] and masks bool
    [n, H, W]; ``names`` are those of the classes.
    """
    factor = max(1, min(-(-LEAST_SIDE // min(image.size)), LARGEST_SIDE // max(image.size)))
    size = (image.size[0] * factor, image.size[1] * factor)
    picture = pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))  # uint8 [3, H, W]
    labels = [int(label) for label in objects["labels"]]
    if not labels:
        return to_pil_image(picture)
    colours = [_colour(label) for label in labels]
    if "masks" in objects:
        masks = objects["masks"].repeat_interleave(factor, 1).repeat_interleave(factor, 2)  # [n, H, W]
        picture = draw_segmentation_masks(picture, masks.bool(), alpha=MASK_ALPHA, colors=colours)
    scores: Any = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
    texts = [
        names[label - 1] + ("" if score is None else f" {score:.2f}")
        for label, score in zip(labels, scores, strict=True)
    ]
    boxes = objects["boxes"] * factor
    return to_pil_image(draw_bounding_boxes(picture, boxes, texts, colours, width=2, font=_font(), font_size=16))


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label * TURN % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font() -> str | None:
    """The font that matplotlib ships, where it is installed: Pillow's own is tiny."""
    try:
        from matplotlib import font_manager
    except ImportError:
        return None
    return font_manager.findfont("DejaVu Sans")
