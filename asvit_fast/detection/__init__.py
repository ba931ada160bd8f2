"""Detection and dense prediction with As-ViT (arXiv 2202.11921, section 5.3) and any hierarchical network."""

from .backbone import Backbone, backbone
from .cost import detector_macs
from .detectors import Detector, DetectorOptions, cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn

__all__ = [
    "Backbone",
    "Detector",
    "DetectorOptions",
    "backbone",
    "cascade_mask_rcnn",
    "cascade_rcnn",
    "detector_macs",
    "faster_rcnn",
    "mask_rcnn",
]
