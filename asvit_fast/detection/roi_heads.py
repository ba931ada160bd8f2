"""What is done with proposals: RoIAlign for maps of any stride, and the three stages of Cascade R-CNN.

Losses, samplers, coders and post-processing are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import roi_heads as parts
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper

Maps = dict[str, Tensor]
Targets = list[dict[str, Tensor]]
Sizes = list[tuple[int, int]]


class RoIAlign(MultiScaleRoIAlign):
    """torchvision's, with the strides of the maps that it is given.

    torchvision guesses them once, by the height of the first image without its padding: wrong for an image of 32 x 4000
    pixels, of which it makes one 11 pixels high, and for all images after it; and wrong once tokens get finer.
    """

    def __init__(self, featmap_names: list[str], output_size: int, sampling_ratio: int, divisor: int) -> None:
        super().__init__(featmap_names, output_size, sampling_ratio)
        self.divisor = divisor  # of the sides of padded images

    def forward(self, x: Maps, boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        """Maps [B, C, h, w] and boxes [n, 4] of each image -> [sum of n, C, output_size, output_size]."""
        longest = max(max(sides) for sides in zip(*image_shapes, strict=True))
        padded = -(-longest // self.divisor) * self.divisor
        finest = max(x[self.featmap_names[0]].shape[2:])
        level = round(math.log2(padded / finest))  # its stride is 2 to the power of this
        self.scales = [2.0 ** -(level + index) for index in range(len(self.featmap_names))]
        self.map_levels = LevelMapper(
            level, level + len(self.featmap_names) - 1, self.canonical_scale, self.canonical_level
        )
        return super().forward(x, boxes, image_shapes)


class RoIHeads(parts.RoIHeads):
    """torchvision's, which can train on an image without objects that no proposal was found in."""

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        together = super().add_gt_proposals(proposals, gt_boxes)
        corner = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # [1, 4]: background; the mean over no proposals is not a number
        return [boxes if len(boxes) else corner.to(boxes) for boxes in together]


def single(x: Tensor) -> Tensor:
    """Float32 of what has fewer bits."""
    return x if x.dtype.itemsize >= 4 else x.float()


class Predictor(FastRCNNPredictor):
    """torchvision's, whose answers are float32 under autocast, too: it adds them to pixels in the type that they have,
    and bfloat16 has no odd pixels above 256."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return single(scores), single(deltas)


class ProposalHead(RPNHead):
    """torchvision's head of the region proposal network, with answers in float32 for the same reason."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return list(map(single, objectness)), list(map(single, deltas))


class ClassAgnosticPredictor(nn.Module):
    """Scores of all classes and one box for all of them: [n, features] -> [n, classes], [n, 4 * classes]."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_score = nn.Linear(features, num_classes)
        self.bbox_pred = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return single(self.cls_score(x)), single(self.bbox_pred(x)).repeat(1, self.num_classes)


class CascadeRoIHeads(nn.Module):
    """Heads in stages, each of which refines the boxes of the one before it (Cai and Vasconcelos, arXiv 1712.00726).

    Trained, every stage samples the refined boxes by its own IoU and has its own heads, whose losses count by
    ``loss_weights``. Tested, scores and masks are the means of all stages, boxes those of the last.

    Args:
        stages: one ``RoIHeads`` for each, with class-agnostic boxes.
        loss_weights: of the losses of each stage.
    """

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float]) -> None:
        super().__init__()
        # no ModuleList: FSDP2 would shard a stage by its forward pass, which is not what runs
        self.stages = nn.ModuleDict({str(number): stage for number, stage in enumerate(stages)})
        self.loss_weights = tuple(loss_weights)

    @property
    def last(self) -> Any:
        return list(self.stages.values())[-1]

    def has_mask(self) -> bool:
        return self.last.has_mask()

    def forward(
        self, features: Maps, proposals: list[Tensor], image_shapes: Sizes, targets: Targets | None = None
    ) -> tuple[Targets, dict[str, Tensor]]:
        """Detections of each image (tested), losses by name (trained): torchvision's contract."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    # ------------------------------------------------------------------ training

    def _losses(
        self, features: Maps, proposals: list[Tensor], image_shapes: Sizes, targets: Targets | None
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.stages.values(), self.loss_weights, strict=True)):
            found, proposals = self._stage_losses(stage, features, proposals, image_shapes, targets)
            losses |= {f"{name}_{number}": weight * loss for name, loss in found.items()}
        return losses

    def _stage_losses(
        self, stage: Any, features: Maps, proposals: list[Tensor], image_shapes: Sizes, targets: Any
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The losses of a stage, and the boxes that it makes of the proposals that it learnt from."""
        proposals, matched, labels, wanted = stage.select_training_samples(list(proposals), targets)
        logits, regression = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, image_shapes)))
        classifier, boxes = parts.fastrcnn_loss(logits, regression, labels, wanted)
        losses = {"loss_classifier": classifier, "loss_box_reg": boxes}
        if stage.has_mask():
            losses["loss_mask"] = _mask_loss(stage, features, proposals, matched, labels, image_shapes, targets)
        with torch.no_grad():
            refined = _refine(stage, regression, proposals, image_shapes)
            refined = [boxes[box_ops.remove_small_boxes(boxes, min_size=1e-2)] for boxes in refined]
        return losses, refined

    # ------------------------------------------------------------------ testing

    def _detect(self, features: Maps, proposals: list[Tensor], image_shapes: Sizes) -> Targets:
        stage: Any
        scores, total = [], len(self.stages)
        for index, stage in enumerate(self.stages.values()):
            pooled = stage.box_roi_pool(features, proposals, image_shapes)  # [n, C, 7, 7]
            logits, regression = stage.box_predictor(stage.box_head(pooled))  # [n, classes], [n, 4 * classes]
            scores.append(F.softmax(logits, -1))
            if index + 1 < total:
                proposals = _refine(stage, regression, proposals, image_shapes)
        mean = torch.stack(scores).mean(0)  # [n, classes]; the softmax of its logarithm is itself
        found = self.last.postprocess_detections(mean.log(), regression, proposals, image_shapes)
        result = [dict(zip(("boxes", "scores", "labels"), one, strict=True)) for one in zip(*found, strict=True)]
        if self.has_mask():
            self._add_masks(result, features, image_shapes)
        return result

    def _add_masks(self, result: Targets, features: Maps, image_shapes: Sizes) -> None:
        boxes, labels = ([one[name] for one in result] for name in ("boxes", "labels"))
        stage: Any
        by_stage = []
        for stage in self.stages.values():
            pooled = stage.mask_roi_pool(features, boxes, image_shapes)  # [n, C, 14, 14]
            logits = stage.mask_predictor(stage.mask_head(pooled))  # [n, classes, 28, 28]
            by_stage.append(parts.maskrcnn_inference(logits, labels))
        for one, *masks in zip(result, *by_stage, strict=True):
            one["masks"] = torch.stack(masks).mean(0)  # [n, 1, 28, 28]


def _refine(stage: Any, regression: Tensor, proposals: list[Tensor], image_shapes: Sizes) -> list[Tensor]:
    """The boxes that a stage makes of its proposals, inside the images: as many of each image."""
    counts = [len(boxes) for boxes in proposals]
    boxes = stage.box_coder.decode(regression[:, :4], proposals).reshape(-1, 4)  # [n, 4]
    return [
        box_ops.clip_boxes_to_image(part, shape) for part, shape in zip(boxes.split(counts), image_shapes, strict=True)
    ]


def _mask_loss(
    stage: Any,
    features: Maps,
    proposals: list[Tensor],
    matched: list[Tensor],
    labels: list[Tensor],
    image_shapes: Sizes,
    targets: Targets,
) -> Tensor:
    """Of the proposals that hold an object: []."""
    positive = [torch.where(one > 0)[0] for one in labels]
    boxes = [one[index] for one, index in zip(proposals, positive, strict=True)]
    objects = [one[index] for one, index in zip(matched, positive, strict=True)]
    logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))
    truth, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
    return parts.maskrcnn_loss(logits, boxes, truth, classes, objects)
