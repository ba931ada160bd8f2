"""Training-free scores: how a network stretches and bends a circle of inputs, and how trainable it is."""

from ..settings import METRICS, ScoreSettings
from .curve import Curve, circle, curve, theta_grid
from .measures import curvature, gauss_length, length_distortion
from .ntk import ntk_condition, ntk_gram
from .result import Measure, Score
from .score import score, score_repeat

__all__ = [
    "METRICS",
    "Curve",
    "Measure",
    "Score",
    "ScoreSettings",
    "circle",
    "curvature",
    "curve",
    "gauss_length",
    "length_distortion",
    "ntk_condition",
    "ntk_gram",
    "score",
    "score_repeat",
    "theta_grid",
]
