"""Where a score lies among those of random topologies, which a stored sample holds: a score alone says little.

The sample is that of ``benchmarks/score_sample.py``: topologies drawn uniformly from Table 1, of depths 1 and the
default width, scored on normal noise in the paper's convention.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from pathlib import Path
from typing import Any

from ..settings import ScoreSettings, image_sides
from ..topology import DEFAULT_WIDTH, Topology

SAMPLE = Path(__file__).parent / "random_topologies.json"
LARGER_IS_BETTER = {"length_distortion": True, "ntk_condition": False, "curvature": False, "gauss_length": True}


@functools.lru_cache(maxsize=1)
def stored_sample() -> dict[str, Any]:
    """The sample by image size: ``{"64x64": {"repeats": 2, "seed": 2202, "scores": {metric: values}}}``, the values in
    ascending order."""
    sample = json.loads(SAMPLE.read_text())
    for part in sample.values():
        part["scores"] = {metric: sorted(values) for metric, values in part["scores"].items()}
    return sample


def percentile(metric: str, value: float, target: Any, settings: ScoreSettings, noise: bool = True) -> float | None:
    """The share of random topologies, in percent, whose score is worse: smaller, or for the NTK condition number and
    curvature larger. Half of equal ones count.

    None where nothing comparable is stored: for other networks than topologies of depths 1 and width 32, other image
    sizes, the reference convention, another treatment of norms or number of thetas, or an NTK of another number of
    images or of others than ``noise``; and for a value that is not a number.
    """
    sample = stored_sample().get("x".join(map(str, image_sides(settings.img_size))))
    comparable = (
        isinstance(target, Topology)
        and target.width == DEFAULT_WIDTH
        and set(target.depths) == {1}
        and settings.convention == "paper"
        and settings.norms == "auto"
        and (settings.batch if metric == "ntk_condition" else settings.thetas)
        == getattr(ScoreSettings, "batch" if metric == "ntk_condition" else "thetas")
        and (noise or metric != "ntk_condition")
    )
    if sample is None or not comparable or math.isnan(value):
        return None
    values = sample["scores"][metric]
    smaller = (bisect.bisect_left(values, value) + bisect.bisect_right(values, value)) / 2 / len(values)
    return 100 * (smaller if LARGER_IS_BETTER[metric] else 1 - smaller)
