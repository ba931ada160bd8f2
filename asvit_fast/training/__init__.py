"""Training with progressive re-tokenization (As-ViT, arXiv 2202.11921, section 3.4)."""

from ..recipe import Recipe
from .callbacks import Callback, MlflowTracker, TensorBoard, TrainingInfo, WandbTracker
from .result import TrainResult
from .retokenizer import Retokenizer
from .schedule import Phase, RetokenizationSchedule
from .schedule_cost import ScheduleCost, schedule_cost
from .token_reduction import set_token_reduction, token_reduction
from .train import train

__all__ = [
    "Callback",
    "MlflowTracker",
    "Phase",
    "Recipe",
    "RetokenizationSchedule",
    "Retokenizer",
    "ScheduleCost",
    "TensorBoard",
    "TrainResult",
    "TrainingInfo",
    "WandbTracker",
    "schedule_cost",
    "set_token_reduction",
    "token_reduction",
    "train",
]
