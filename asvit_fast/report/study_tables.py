"""A study in numbers: how well each measure orders networks, and the networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..runs import Run
from ..studies.analysis import AGAINST, ALL_KINDS, Estimate, accuracy_of
from ..studies.result import Study

Table = tuple[str, str, Sequence[str], Sequence[Sequence[Any]]]  # title, note, header, rows
MOST_ROWS = 10  # of the best and the worst networks


def study_result_table(run: Run) -> Table:
    """What was trained, how much accuracies differ, and how much of that is the seed."""
    result = Study(run.trace, run.config["seed"])
    facts = result.to_dict()
    top1 = facts["top1"]
    rows: list[Sequence[Any]] = [
        ("topologies", f"{len(run.trace)} of {run.config['topologies']}"),
        ("top-1 (%), lowest, mean, highest", ", ".join(f"{top1[name]:.1f}" for name in ("lowest", "mean", "highest"))),
        ("regret of a topology drawn at random (points)", f"{facts['chance_regret']:.1f}"),
        ("trainings that diverged", str(len(result.diverged))),
    ]
    if result.noise is not None:
        noise = result.noise
        rows += [
            (
                "standard deviation of top-1 over seeds (points)",
                f"{noise.within:.2f}, from {noise.networks} topologies",
            ),
            ("standard deviation of top-1 over topologies (points)", f"{noise.total:.2f}, seeds included"),
            ("Kendall's tau of a perfect measure, about", f"{noise.ceiling:.2f}"),
        ]
    return ("Result" if run.finished else "So far"), "", ("", "value"), rows


def measure_table(run: Run) -> Table:
    """Every measure, the best first."""
    result = Study(run.trace, run.config["seed"])
    columns = (
        result.kendall_tau, result.spearman_rho, result.tau_at_equal_params, result.tau_at_equal_flops, result.gain
    )  # fmt: skip
    taus = result.kendall_tau
    names = sorted(taus, key=lambda name: -taus[name].value if math.isfinite(taus[name].value) else math.inf)
    rows: list[Sequence[Any]] = []
    for name in names:
        numbers = f"{100 * result.precision_at_top[name]:.0f} %", f"{result.regret[name]:.1f}"
        estimates = (_text(column[name]) for column in columns)
        rows.append(
            (ALL_KINDS[name].title, ALL_KINDS[name].source, *estimates, *numbers, f"{result.seconds[name]:.4f}")
        )
    note = (
        "Correlations with top-1 in the direction in which a measure is said to be better, with 95 % bootstrap "
        f"intervals; gain: tau minus that of the {ALL_KINDS[AGAINST].title}, of the same resamples. Found: how many of "
        "the best tenth are in the best tenth by the measure, a tenth by chance. Regret: points of top-1 between the "
        "best network and the one with the best measure. Seconds: of one network."
    )
    header = (
        "measure", "source", "tau", "rho", "tau at equal parameters", "tau at equal MACs", "gain", "found", "regret",
        "seconds",
    )  # fmt: skip
    return "Measures", note, header, rows


def network_table(run: Run) -> Table:
    """The best and the worst networks."""
    ordered = sorted(run.trace, key=lambda row: -_finite(accuracy_of(row)))
    chosen = ordered if len(ordered) <= 2 * MOST_ROWS else [*ordered[:MOST_ROWS], *ordered[-MOST_ROWS:]]
    rows = [
        (
            row["topology"],
            " / ".join(f"{float(value):.1f}" for value in row["top1"]),
            f"{row['measures']['params'] / 1e6:.2f}",
            f"{row['measures']['flops'] / 1e6:.1f}",
            f"{float(row['measures']['length_distortion']):.4g}",
            f"{float(row['measures']['ntk_condition']):.4g}",
        )
        for row in chosen
    ]
    note = f"The best {MOST_ROWS} and the worst {MOST_ROWS}." if len(chosen) < len(ordered) else ""
    header = ("topology", "top-1 (%), by seed", "params (M)", "MACs (M)", "length distortion", "NTK condition")
    return "Networks", note, header, rows


def _text(estimate: Estimate) -> str:
    return str(estimate) if math.isfinite(estimate.value) else ""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
