"""Detection and dense prediction with As-ViT (arXiv 2202.11921, section 5.3) and any hierarchical network."""

from .backbone import Backbone, backbone
from .build import TrainedDetector, load_detector
from .coco import CocoImages, open_coco
from .cost import detector_macs
from .detectors import Detector, DetectorOptions, cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn
from .evaluate import DetectionEvaluation, evaluate_detector
from .training import DetectionResult, train

__all__ = [
    "Backbone",
    "CocoImages",
    "DetectionEvaluation",
    "DetectionResult",
    "Detector",
    "DetectorOptions",
    "TrainedDetector",
    "backbone",
    "cascade_mask_rcnn",
    "cascade_rcnn",
    "detector_macs",
    "evaluate_detector",
    "faster_rcnn",
    "load_detector",
    "mask_rcnn",
    "open_coco",
    "train",
]
