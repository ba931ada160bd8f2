"""Faster, Mask and Cascade R-CNN of torchvision's parts; only the cascade is ours (``roi_heads.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..errors import InputError
from ..settings import DETECTORS, check_integer
from ..training.fields import is_finite
from .backbone import LEVELS, _prefixed
from .roi_heads import CascadeRoIHeads, ClassAgnosticPredictor, Predictor, ProposalHead, RoIAlign, RoIHeads

BOX_SIDE, MASK_SIDE = 7, 14  # of pooled maps
FRACTIONS = (  # choices from 0 to 1
    "rpn_nms_thresh",
    "rpn_fg_iou_thresh",
    "rpn_bg_iou_thresh",
    "rpn_positive_fraction",
    "box_nms_thresh",
    "box_fg_iou_thresh",
    "box_bg_iou_thresh",
    "box_positive_fraction",
)


@dataclass(frozen=True)
class DetectorOptions:
    """The choices of a detector; names and defaults are those of torchvision's ``FasterRCNN`` and ``MaskRCNN``.

    Beyond these: ``anchor_sizes`` (one for each of five maps, pixels), ``aspect_ratios``, ``representation_size`` of
    the box head's two layers, ``mask_layers`` (channels of the mask head's convolutions), and of a cascade
    ``cascade_ious``, ``cascade_loss_weights`` and ``cascade_reg_weights`` of its stages (arXiv 1712.00726).
    """

    min_size: int = 800
    max_size: int = 1333
    size_divisible: int = 32
    image_mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    image_std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_thresh: float = 0.0
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_fg_iou_thresh: float = 0.5
    box_bg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25
    bbox_reg_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    representation_size: int = 1024
    mask_layers: tuple[int, ...] = (256, 256, 256, 256)
    cascade_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    cascade_loss_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    cascade_reg_weights: tuple[tuple[float, ...], ...] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )

    def __post_init__(self) -> None:
        self._check_values()
        if not len(self.cascade_ious) == len(self.cascade_loss_weights) == len(self.cascade_reg_weights):
            raise InputError(
                f"cascade_ious, cascade_loss_weights and cascade_reg_weights must have an entry for each stage, got "
                f"{len(self.cascade_ious)}, {len(self.cascade_loss_weights)} and {len(self.cascade_reg_weights)}"
            )
        if len(self.anchor_sizes) != len(LEVELS) + 1:
            raise InputError(f"anchor_sizes must be one for each of {len(LEVELS) + 1} maps, got {self.anchor_sizes}")

    def _check_values(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(one.default, int):
                check_integer(one.name, value, 1)
            elif isinstance(one.default, float):
                self._check(one.name, is_finite(value), "a number")
        self._check("max_size", self.max_size >= self.min_size, f"min_size ({self.min_size}) or more")
        for name in FRACTIONS:
            self._check(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        for part in ("rpn", "box"):
            high = getattr(self, f"{part}_fg_iou_thresh")
            low = getattr(self, f"{part}_bg_iou_thresh")
            self._check(f"{part}_bg_iou_thresh", low <= high, f"{part}_fg_iou_thresh ({high}) or less")
        for name in ("image_std", "anchor_sizes", "aspect_ratios", "cascade_ious"):
            self._check(name, _are_positive(getattr(self, name)), "numbers above 0")
        self._check("cascade_ious", max(self.cascade_ious) <= 1, "numbers above 0 and up to 1")
        for name in ("image_mean", "cascade_loss_weights"):
            value = getattr(self, name)
            self._check(name, isinstance(value, tuple) and value and all(map(is_finite, value)), "numbers")
        layers = self.mask_layers
        self._check("mask_layers", _are_positive(layers) and _are_whole(layers), "whole numbers above 0")
        self._check("bbox_reg_weights", _are_positive(self.bbox_reg_weights, 4), "four numbers above 0")
        stages = self.cascade_reg_weights
        well = isinstance(stages, tuple) and all(_are_positive(weights, 4) for weights in stages)
        self._check("cascade_reg_weights", well, "four numbers above 0 for each stage")

    def _check(self, name: str, holds: Any, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, **options: Any) -> DetectorOptions:
        """Some changed. Raises InputError for a name that is none of them."""
        known = [one.name for one in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"unknown option {', '.join(unknown)} of a detector; one of {', '.join(known)}")
        return cls(**{name: _tuples(value) for name, value in options.items()})


def _are_positive(values: Any, count: int | None = None) -> bool:
    """Whether it is a tuple of numbers above 0: of so many, or of any."""
    right = isinstance(values, tuple) and (len(values) == count if count is not None else len(values) > 0)
    return right and all(is_finite(value) and value > 0 for value in values)


def _are_whole(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


def _tuples(value: Any) -> Any:
    """Lists, as files hold them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


class ImageTransform(GeneralizedRCNNTransform):
    """torchvision's resizing and normalisation; images so thin that its scale leaves no pixel of a side keep one."""

    fixed_size: tuple[int, int] | None

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Image [C, H, W] and its target, scaled."""
        short, long = sorted(image.shape[-2:])
        if self.fixed_size is not None or short * self.max_size > long:
            return super().resize(image, target)
        height, width = (max(1, side * self.max_size // long) for side in image.shape[-2:])
        self.fixed_size = (width, height)
        try:
            return super().resize(image, target)
        finally:
            self.fixed_size = None


class Detector(GeneralizedRCNN):
    """torchvision's ``GeneralizedRCNN``: images, a list of [3, H, W] from 0 to 1 of any sizes, -> a list of {"boxes":
    [n, 4] in pixels, "labels": int64 [n], "scores": [n], "masks": [n, 1, H, W] from 0 to 1}; in training, with targets
    of the same form (masks uint8 [n, H, W]), -> {name of a loss: []}.

    Attributes:
        num_classes: the background, number 0, included.
        has_masks: whether it finds and needs masks.
        options: its choices.
    """

    in_chans = 3
    backbone: Any
    roi_heads: Any

    def __init__(self, backbone: nn.Module, num_classes: int, roi_heads: nn.Module, options: DetectorOptions) -> None:
        transform = ImageTransform(
            options.min_size,
            options.max_size,
            list(options.image_mean),
            list(options.image_std),
            size_divisible=options.size_divisible,
        )
        super().__init__(backbone, _rpn(backbone, options), roi_heads, transform)
        self.num_classes, self.options = num_classes, options

    @property
    def has_masks(self) -> bool:
        return self.roi_heads.has_mask()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations of the backbone again in the backward pass. Raises InputError where it cannot."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of what timm's optimizers keep from decaying."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the backbone, for layer-wise decay (timm's contract). Raises InputError where it has none."""
        return _prefixed(self.backbone.group_matcher(coarse), "backbone")


def _rpn(backbone: Any, options: DetectorOptions) -> RegionProposalNetwork:
    sizes = tuple((size,) for size in options.anchor_sizes)
    anchors = AnchorGenerator(sizes, (options.aspect_ratios,) * len(sizes))
    return RegionProposalNetwork(
        anchors,
        ProposalHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        options.rpn_fg_iou_thresh,
        options.rpn_bg_iou_thresh,
        options.rpn_batch_size_per_image,
        options.rpn_positive_fraction,
        {"training": options.rpn_pre_nms_top_n_train, "testing": options.rpn_pre_nms_top_n_test},
        {"training": options.rpn_post_nms_top_n_train, "testing": options.rpn_post_nms_top_n_test},
        options.rpn_nms_thresh,
        score_thresh=options.rpn_score_thresh,
    )


def _heads(
    backbone: Any,
    num_classes: int,
    masks: bool,
    options: DetectorOptions,
    iou: tuple[float, float],
    reg_weights: tuple[float, ...],
    predictor: Callable[[int, int], nn.Module],
) -> RoIHeads:
    """The heads of one stage; ``iou``: what an object must overlap by, and what is background below."""
    channels, divisor = backbone.out_channels, options.size_divisible

    def pool(side: int) -> RoIAlign:
        return RoIAlign(list(LEVELS), side, 2, divisor)

    mask_parts = {}
    if masks:
        mask_parts = {
            "mask_roi_pool": pool(MASK_SIDE),
            "mask_head": MaskRCNNHeads(channels, options.mask_layers, 1),
            "mask_predictor": MaskRCNNPredictor(options.mask_layers[-1], options.mask_layers[-1], num_classes),
        }
    return RoIHeads(
        pool(BOX_SIDE),
        TwoMLPHead(channels * BOX_SIDE**2, options.representation_size),
        predictor(options.representation_size, num_classes),
        *iou,
        options.box_batch_size_per_image,
        options.box_positive_fraction,
        reg_weights,
        options.box_score_thresh,
        options.box_nms_thresh,
        options.box_detections_per_img,
        **mask_parts,
    )


def _single(backbone: nn.Module, num_classes: int, masks: bool, options: DetectorOptions) -> Detector:
    iou = (options.box_fg_iou_thresh, options.box_bg_iou_thresh)
    _check(backbone, num_classes)
    heads = _heads(backbone, num_classes, masks, options, iou, options.bbox_reg_weights, Predictor)
    return Detector(backbone, num_classes, heads, options)


def _cascade(backbone: nn.Module, num_classes: int, masks: bool, options: DetectorOptions) -> Detector:
    _check(backbone, num_classes)
    stages = [
        _heads(backbone, num_classes, masks, options, (iou, iou), weights, ClassAgnosticPredictor)
        for iou, weights in zip(options.cascade_ious, options.cascade_reg_weights, strict=True)
    ]
    return Detector(backbone, num_classes, CascadeRoIHeads(stages, options.cascade_loss_weights), options)


def _check(backbone: nn.Module, num_classes: int) -> None:
    check_integer("num_classes", num_classes, 2)
    if not isinstance(getattr(backbone, "out_channels", None), int):
        raise InputError(
            f"a detector needs a backbone with out_channels, got {type(backbone).__name__}; make one with "
            "asvit_fast.detection.backbone"
        )


def faster_rcnn(backbone: nn.Module, num_classes: int = 91, **options: Any) -> Detector:
    """Faster R-CNN (arXiv 1506.01497) with a feature pyramid: boxes.

    Args:
        backbone: of ``asvit_fast.detection.backbone``, or any with the contract of torchvision's ``BackboneWithFPN``
            and maps "0" to "3" and one more.
        num_classes: the background included, which is class 0: 91 for COCO's category ids as classes.
        options: the fields of ``DetectorOptions``, named as torchvision's.

    Raises:
        InputError: an option that is unknown or cannot be.
    """
    return _single(backbone, num_classes, False, DetectorOptions.of(**options))


def mask_rcnn(backbone: nn.Module, num_classes: int = 91, **options: Any) -> Detector:
    """Mask R-CNN (arXiv 1703.06870): boxes and masks. Arguments as ``faster_rcnn``; given the weights of torchvision's
    ``MaskRCNN``, whose names it has, it finds the same.

    Raises:
        InputError: an option that is unknown or cannot be.
    """
    return _single(backbone, num_classes, True, DetectorOptions.of(**options))


def cascade_rcnn(backbone: nn.Module, num_classes: int = 91, **options: Any) -> Detector:
    """Cascade R-CNN (Cai and Vasconcelos, arXiv 1712.00726): three stages of IoU 0.5, 0.6, 0.7 with class-agnostic
    boxes and averaged scores. Arguments as ``faster_rcnn``.

    Raises:
        InputError: an option that is unknown or cannot be.
    """
    return _cascade(backbone, num_classes, False, DetectorOptions.of(**options))


def cascade_mask_rcnn(backbone: nn.Module, num_classes: int = 91, **options: Any) -> Detector:
    """Cascade R-CNN with a mask head in every stage, the detector of the paper's Table 8 (As-ViT, arXiv 2202.11921).
    Arguments as ``faster_rcnn``.

    Raises:
        InputError: an option that is unknown or cannot be.
    """
    return _cascade(backbone, num_classes, True, DetectorOptions.of(**options))


MAKERS: dict[str, Callable[..., Detector]] = dict(
    zip(DETECTORS, (faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn), strict=True)
)

MASKED = ("mask_rcnn", "cascade_mask_rcnn")  # those that find masks


def stage_heads(detector: Detector) -> list[Any]:
    """The heads of all stages, one of a detector without a cascade."""
    heads = detector.roi_heads
    return list(heads.stages.values()) if isinstance(heads, CascadeRoIHeads) else [heads]
