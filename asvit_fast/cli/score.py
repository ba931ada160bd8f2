"""``asvit-fast score``: the training-free scores of one network."""

from __future__ import annotations

from types import SimpleNamespace

from ..files import to_json
from ..scoring import Score, score
from ..scoring.result import percentile_text
from ..settings import ScoreSettings
from ..what import resolve
from .common import initialisations, size_text, source_text, table
from .options import chosen

DIRECTIONS = {
    "length_distortion": "larger is better",
    "ntk_condition": "smaller is better",
    "curvature": "informative",
    "gauss_length": "informative",
}


def run(values: SimpleNamespace) -> int:
    target = resolve(values.what)
    result = score(
        target.fresh if target.weights is None else target.load().model.eval(),
        images=values.images,
        seed=values.seed,
        **chosen(values, ScoreSettings),
    )
    print(to_json(result.to_dict()) if values.json else describe(values, result))
    return 0


def describe(values: SimpleNamespace, result: Score) -> str:
    """The scores as a table, with what they were measured on above it."""
    heading = (
        f"{values.what}\n{initialisations(values.repeats)} at {size_text(values.img_size)} pixels, seed {values.seed}, "
        f"{values.convention} convention, {source_text(values.images)}\n"
    )
    rows = [("score", "mean", "std", "seconds", "direction", "")]
    for metric in values.metrics:
        measured = result[metric]
        numbers = f"{measured.mean:.5g}", f"± {measured.std:.2g}", f"{measured.seconds:.2f}"
        rows.append((metric, *numbers, DIRECTIONS[metric], percentile_text(metric, measured.percentile)))
    return heading + "\n" + table(rows)
