"""Training with progressive re-tokenization (As-ViT, arXiv 2202.11921, section 3.4)."""

from .recipe import Recipe
from .result import TrainResult
from .train import train

__all__ = ["Recipe", "TrainResult", "train"]
