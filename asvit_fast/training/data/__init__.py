"""Images for training and validation: timm's data sets and augmentation, in batches that can be continued anywhere."""

from .reader import Reader
from .splits import DataSets, TrainingData, Validation, load_data, load_validation

__all__ = ["DataSets", "Reader", "TrainingData", "Validation", "load_data", "load_validation"]
