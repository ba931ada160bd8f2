"""What a study says in words, on the command line and in reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .analysis import FEWEST
from .result import Study

FEWEST_REPEATED = 5  # networks with several trainings, to say what a perfect measure could reach


class Accuracies:
    """How accuracies are written: those of our trainings in percent, those of elsewhere in a unit nobody knows."""

    def __init__(self, percent: bool) -> None:
        self.unit = " %" if percent else ""
        self.title = "top-1 (%)" if percent else "accuracy"
        self.name = "top-1" if percent else "accuracy"
        self._format = ".1f" if percent else ".4g"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Accuracies:
        """Those of a study with this configuration."""
        return cls(percent="accuracies" not in config)

    def __call__(self, value: float) -> str:
        return format(value, self._format) if np.isfinite(value) else "none"


def remarks(result: Study) -> list[str]:
    """Sentences on what the numbers of a study can and cannot tell."""
    accuracy = result.analysis.accuracy  # [n]
    known = accuracy[np.isfinite(accuracy)]
    lines = []
    if not len(known):
        lines.append("Every training diverged: there is no accuracy to compare. Lower the learning rate.")
    elif len(accuracy) == 1:
        lines.append("One topology has no order: a study needs several.")
    elif len(set(accuracy)) == 1:
        lines.append("All topologies have the same accuracy: there is no order. Do the data have several classes?")
    elif len(accuracy) < FEWEST:
        lines.append(f"Fewer than {FEWEST} topologies tell next to nothing: intervals are all that is possible.")
    if (noise := result.noise) and np.isfinite(noise.within):
        said = f"{noise.networks} topologies were trained several times"
        lines.append(f"Another training changes the accuracy by {noise.within:.2g} (standard deviation; {said})")
        few = "; too few to say how near to 1 a perfect measure would come."
        ceiling = f", so a perfect measure would reach a tau of about {noise.ceiling:.2f}."
        lines[-1] += few if noise.networks < FEWEST_REPEATED else ceiling
    if len(known) and (diverged := result.diverged):
        lines.append(
            f"{len(diverged)} diverged; they rank last, and regret takes their accuracy for the lowest of the others: "
            f"{', '.join(diverged)}."
        )
    return lines
