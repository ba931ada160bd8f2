"""``asvit-fast score``: the training-free scores of one network."""

from __future__ import annotations

from types import SimpleNamespace

from .common import SCORING, WHAT, initialisations, size_text, source_text, table
from .options import Command, Option, flag, listed, text

DIRECTIONS = {
    "length_distortion": "larger is better",
    "ntk_condition": "smaller is better",
    "curvature": "informative",
    "gauss_length": "informative",
}


def run(values: SimpleNamespace) -> int:
    from ..files import to_json
    from ..scoring import score
    from ..scoring.memory import disable_malloc_trim
    from ..what import resolve

    disable_malloc_trim()
    target = resolve(values.what)
    result = score(
        target.fresh if target.weights is None else target.load().model.eval(),
        metrics=values.metrics,
        img_size=values.img_size,
        thetas=values.thetas,
        repeats=values.repeats,
        batch=values.batch,
        images=values.images,
        seed=values.seed,
        convention=values.convention,
        norms=values.norms,
        device=values.device,
    )
    print(to_json(result.to_dict()) if values.json else describe(values, result))
    return 0


def describe(values: SimpleNamespace, result) -> str:
    """The scores as a table, with what they were measured on above it."""
    heading = (
        f"{values.what}\n{initialisations(values.repeats)} at {size_text(values.img_size)} pixels, seed {values.seed}, "
        f"{values.convention} convention, {source_text(values.images)}\n"
    )
    rows = [("score", "mean", "std", "seconds", "direction")]
    for metric in values.metrics:
        measured = result[metric]
        rows.append(
            (
                metric,
                f"{measured.mean:.5g}",
                f"± {measured.std:.2g}",
                f"{measured.seconds:.2f}",
                DIRECTIONS[metric],
            )
        )
    return heading + "\n" + table(rows)


COMMAND = Command(
    name="score",
    summary="Score a network without training it: length distortion, curvature, NTK condition number.",
    options=(
        Option("what", text, None, WHAT, positional=True, required=True),
        Option(
            "metrics",
            listed,
            ("length_distortion", "curvature", "ntk_condition"),
            "scores to compute, separated by commas",
            "NAMES",
        ),
        *SCORING,
        Option("json", flag, False, "print strict JSON and nothing else", flag=True),
    ),
    run=run,
    epilog="example: asvit-fast score '8,2,3|4,1,2|4,1,4|4,1,6|32' --img-size 224 --repeats 5",
)
