"""asvit_fast: design, score, scale and accelerate vision transformers. Source of the method: As-ViT (arXiv
2202.11921)."""

from . import detection, models, nn, ops, scoring, taylor, training
from ._version import __version__
from .acceleration import accelerate, check_replacement, restore, verify
from .backends import use_backend
from .bench import BenchRow, benchmark
from .environment import show_config
from .errors import InputError
from .malloc import tune_allocator
from .models import AsViT, convert_asvit_state_dict, create_model
from .scoring import (
    curvature,
    curve,
    gauss_length,
    length_distortion,
    ntk_condition,
    ntk_gram,
    score,
)
from .search import Budget, scale, search
from .studies import Study, study
from .taylor import jet, jvp
from .topology import SearchSpace, StageSpec, Topology
from .training import Callback, RetokenizationSchedule, Retokenizer, TrainResult, set_token_reduction, train

__all__ = [
    "AsViT",
    "BenchRow",
    "Budget",
    "Callback",
    "InputError",
    "RetokenizationSchedule",
    "Retokenizer",
    "SearchSpace",
    "StageSpec",
    "Study",
    "Topology",
    "TrainResult",
    "__version__",
    "accelerate",
    "benchmark",
    "check_replacement",
    "convert_asvit_state_dict",
    "create_model",
    "curvature",
    "curve",
    "detection",
    "gauss_length",
    "jet",
    "jvp",
    "length_distortion",
    "models",
    "nn",
    "ntk_condition",
    "ntk_gram",
    "ops",
    "restore",
    "scale",
    "score",
    "scoring",
    "search",
    "set_token_reduction",
    "show_config",
    "study",
    "taylor",
    "train",
    "training",
    "tune_allocator",
    "use_backend",
    "verify",
]
