"""A study in numbers: how well each measure orders networks, and the networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..runs import Run
from ..studies.analysis import AGAINST, accuracy_of, kind_of
from ..studies.result import Study
from ..studies.words import FEWEST_REPEATED, Accuracies, remarks

Table = tuple[str, str, Sequence[str], Sequence[Sequence[Any]]]  # title, note, header, rows
MOST_ROWS = 10  # of the best and the worst networks


def study_result_table(run: Run) -> Table:
    """What was trained, how much accuracies differ, and how much of that is the seed."""
    result = Study(run.trace, run.config["seed"])
    facts, written = result.to_dict(), Accuracies.of(run.config)
    top1 = ", ".join(written(facts["top1"][name]) for name in ("lowest", "mean", "highest"))
    rows: list[Sequence[Any]] = [
        ("topologies", f"{len(run.trace)} of {run.config['topologies']}"),
        (f"{written.title}, lowest, mean, highest", top1),
        ("how far a topology drawn at random is behind the best", written(facts["chance_regret"])),
        ("topologies of which a training diverged", str(len(result.diverged))),
    ]
    if result.noise is not None:
        noise = result.noise
        rows += [
            (
                f"standard deviation of {written.name} over trainings",
                f"{noise.within:.2f}, from {noise.networks} topologies",
            ),
            (f"standard deviation of {written.name} over topologies", f"{noise.total:.2f}, those included"),
        ]
        if noise.networks >= FEWEST_REPEATED:
            rows.append(("Kendall's tau of a perfect measure, about", f"{noise.ceiling:.2f}"))
    return ("Result" if run.finished else "So far"), " ".join(remarks(result)), ("", "value"), rows


def measure_table(run: Run) -> Table:
    """Every measure, the best first."""
    result = Study(run.trace, run.config["seed"])
    columns = (
        result.kendall_tau, result.spearman_rho, result.tau_at_equal_params, result.tau_at_equal_flops, result.gain
    )  # fmt: skip
    taus, written = result.kendall_tau, Accuracies.of(run.config)
    names = sorted(taus, key=lambda name: -taus[name].value if math.isfinite(taus[name].value) else math.inf)
    rows: list[Sequence[Any]] = []
    for name in names:
        numbers = f"{100 * result.precision_at_top[name]:.0f} %", written(result.regret[name])
        estimates = (str(column[name]) for column in columns)
        rows.append((kind_of(name).title, kind_of(name).source, *estimates, *numbers, f"{result.seconds[name]:.4f}"))
    best = f"{result.analysis.best_tenth} of {len(result.rows)}"
    note = (
        f"Correlations with {written.name} in the direction in which a measure is said to be better, with 95 % "
        f"bootstrap intervals; gain: tau minus that of the {kind_of(AGAINST).title}, of the same resamples. Found: how "
        f"many of the best tenth ({best}) are in the best tenth by the measure. Regret: how far the network with the "
        f"best measure is behind the best one in {written.name}. Seconds: of one network."
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
    written = Accuracies.of(run.config)
    rows = [
        (
            row["topology"],
            " / ".join(written(float(value)) for value in row["top1"]),
            f"{row['measures']['params'] / 1e6:.2f}",
            f"{row['measures']['flops'] / 1e6:.1f}",
            f"{float(row['measures']['length_distortion']):.4g}",
            f"{float(row['measures']['ntk_condition']):.4g}",
        )
        for row in chosen
    ]
    note = f"The best {MOST_ROWS} and the worst {MOST_ROWS}." if len(chosen) < len(ordered) else ""
    header = (
        "topology",
        f"{written.title}, by training",
        "params (M)",
        "MACs (M)",
        "length distortion",
        "NTK condition",
    )
    return "Networks", note, header, rows


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
