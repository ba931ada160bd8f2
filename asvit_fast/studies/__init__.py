"""Studies: do scores of untrained networks tell which ones train best?"""

from .result import Estimate, Study
from .study import study

__all__ = ["Estimate", "Study", "study"]
