"""Multiply-adds of a detector, by part: of what the papers' tables call its FLOPs."""

from __future__ import annotations

import torch
from torch import nn

from ..cost import count_macs, count_macs_of_call
from ..settings import ImageSize, image_sides
from .backbone import LEVELS
from .detectors import BOX_SIDE, MASK_SIDE, Detector, stage_heads


def detector_macs(
    detector: Detector, img_size: ImageSize = 1024, proposals: int = 1000, detections: int = 100
) -> dict[str, int]:
    """Multiply-adds of one image in inference: {"body", "pyramid", "rpn", "boxes", "masks", "all"}.

    Counted by shapes on the meta device, nothing is computed. Published numbers differ in how many proposals and
    detections they count; ours are torchvision's largest numbers of both.

    Args:
        detector: of this package.
        img_size: pixels after resizing and padding, multiples of 32.
        proposals: boxes that each stage looks at.
        detections: objects that get a mask.

    Raises:
        InputError: a size below 32 pixels.
    """
    backbone, channels, sides = detector.backbone, detector.backbone.out_channels, image_sides(img_size, 32)
    with_pyramid, body = count_macs(backbone, img_size), count_macs(_BodyAlone(backbone), img_size)
    maps = [
        torch.empty(1, channels, *(-(-side // stride) for side in sides), device="meta")
        for stride in (4 * 2**index for index in range(len(LEVELS) + 1))
    ]
    counts = {"body": body, "pyramid": with_pyramid - body, "rpn": count_macs_of_call(_OnAll(detector.rpn.head), *maps)}
    counts["boxes"] = counts["masks"] = 0
    for stage in stage_heads(detector):
        pooled = torch.empty(proposals, channels, BOX_SIDE, BOX_SIDE, device="meta")
        counts["boxes"] += count_macs_of_call(nn.Sequential(stage.box_head, stage.box_predictor), pooled)
        if stage.has_mask():
            pooled = torch.empty(detections, channels, MASK_SIDE, MASK_SIDE, device="meta")
            counts["masks"] += count_macs_of_call(nn.Sequential(stage.mask_head, stage.mask_predictor), pooled)
    return counts | {"all": sum(counts.values())}


class _BodyAlone(nn.Module):
    """Without the pyramid."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.backbone.features(x)  # type: ignore[operator]


class _OnAll(nn.Module):
    """A head that takes a list of maps."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *maps: torch.Tensor) -> object:
        return self.head(list(maps))
