"""Rank correlations, their intervals and what a study concludes from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from asvit_fast.cli.study import describe
from asvit_fast.errors import InputError
from asvit_fast.studies import Estimate, Study
from asvit_fast.studies.analysis import Analysis
from asvit_fast.studies.measures import NAMES
from asvit_fast.studies.ranks import kendall, partial, resamples, spearman, worst_last
from asvit_fast.studies.words import Accuracies, remarks

RNG = np.random.default_rng(0)


def rows(accuracies: list[list[float]], **measures: list[float]) -> list[dict]:
    """Rows of a study in which every measure but those given is the same for all networks."""
    given = {name: measures.get(name, [1.0] * len(accuracies)) for name in NAMES}
    return [
        {
            "step": number,
            "topology": f"network {number}",
            "top1": top1,
            "measures": {name: values[number] for name, values in given.items()},
            "seconds": dict.fromkeys(NAMES, 0.5),
        }
        for number, top1 in enumerate(accuracies)
    ]


@pytest.mark.parametrize("choices", [1000, 4])  # few and many ties
def test_correlations_are_those_of_scipy_also_in_resamples(choices: int) -> None:
    x, y = RNG.integers(0, choices, (2, 30))
    weights = np.concatenate([np.ones((1, 30)), resamples(30, 5, seed=1)])
    taus, rhos = (function(worst_last(x), worst_last(y), weights) for function in (kendall, spearman))
    for weight, tau, rho in zip(weights, taus, rhos, strict=True):
        drawn = np.repeat(np.arange(30), weight.astype(int))
        assert tau == pytest.approx(stats.kendalltau(x[drawn], y[drawn]).statistic, abs=1e-12)
        assert rho == pytest.approx(stats.spearmanr(x[drawn], y[drawn]).statistic, abs=1e-12)


def test_a_constant_measure_has_no_correlation() -> None:
    result = Study(rows([[float(k)] for k in range(12)]))
    assert math.isnan(result.kendall_tau["tokens"].value)
    assert math.isnan(result.spearman_rho["tokens"].high)


def test_what_is_not_finite_ranks_last() -> None:
    assert worst_last([1.0, math.nan, 3.0, math.inf, -math.inf]).tolist() == [1, 0, 2, 0, 0]
    assert worst_last([1.0, math.inf, 3.0], direction=-1).tolist() == [2, 0, 1]


def test_partial_correlation_removes_what_size_explains() -> None:
    size = np.arange(40.0)
    one, other = size + RNG.normal(0, 3, 40), size + RNG.normal(0, 3, 40)
    weights = np.ones((1, 40))
    xy, xz, yz = (kendall(worst_last(a), worst_last(b), weights) for a, b in ((one, other), (one, size), (other, size)))
    assert xy[0] > 0.5 and abs(partial(xy, xz, yz)[0]) < 0.35
    assert np.isnan(partial(xy, np.ones(1), yz)[0])  # size decides all


def test_signs_are_those_in_which_a_measure_is_said_to_be_better() -> None:
    top1 = [float(k) for k in range(20)]
    result = Study(rows([[value] for value in top1], length_distortion=top1, ntk_condition=[-value for value in top1]))
    assert result.kendall_tau["length_distortion"].value == pytest.approx(1)
    assert result.kendall_tau["ntk_condition"].value == pytest.approx(1)
    assert result.kendall_tau["combined_rank"].value == pytest.approx(1)
    assert result.gain["length_distortion"].value == pytest.approx(0)
    assert result.precision_at_top["length_distortion"] == 1
    assert result.regret["length_distortion"] == 0
    assert result.regret["tokens"] == pytest.approx(9.5)  # all are best: the mean of all


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for trial in range(60):
        x = np.random.default_rng(trial).normal(size=(2, 40))
        y = 0.5 * x[0] + math.sqrt(0.75) * x[1]
        estimate = Analysis(rows([[float(v)] for v in y], params=x[0].tolist()), trial).kendall_tau("params")
        held += estimate.low <= 2 / math.pi * math.asin(0.5) <= estimate.high
    assert 51 <= held <= 60


def test_diverged_trainings_are_marked_and_rank_last() -> None:
    top1: list[list[float]] = [[50.0 + k] for k in range(10)] + [[math.nan]]
    result = Study(rows(top1, params=[float(k) for k in range(11)]))
    assert result.diverged == ["network 10"]
    assert result.kendall_tau["params"].value == pytest.approx(1 - 2 * 10 / 55)
    assert result.regret["params"] == pytest.approx(9)  # it picked the network that diverged
    assert result.analysis.chance_regret() == pytest.approx(9 - (45 + 0) / 11)
    assert result.to_dict()["top1"]["lowest"] == 50


def test_noise_of_seeds_leaves_out_what_a_seed_does_to_all() -> None:
    networks, luck = RNG.normal(60, 3, 200), RNG.normal(0, 2, (200, 2))
    accuracies = networks[:, None] + luck + [0.0, -10.0]  # the second seed is worse for all
    ours = [{**row, "train_seconds": [1.0, 1.0]} for row in rows(accuracies.tolist())]
    noise = Study(ours).noise
    assert noise is not None
    assert noise.within == pytest.approx(2, rel=0.15)
    assert noise.reliability == pytest.approx(9 / 11, abs=0.1)  # of the means of two
    assert Study(rows([[1.0], [2.0], [3.0]])).noise is None


def test_an_estimate_prints_as_a_reader_wants_it() -> None:
    assert str(Estimate(0.49, -0.012, 0.7)) == "+0.49 [-0.01, +0.70]"


def test_equals_share_the_best_places() -> None:
    """A measure that is the same for all finds a tenth of the best by chance, in whatever order the rows are."""
    measured = [{"params": 1.0, "flops": float(number // 2)} for number in range(20)]
    rows = [{"measures": m, "top1": [float(number)], "topology": str(number)} for number, m in enumerate(measured)]
    for ordered in (rows, rows[::-1]):
        found = Study(ordered).precision_at_top
        assert found["params"] == pytest.approx(0.1) and found["flops"] == pytest.approx(1.0)


def test_few_networks_have_no_narrow_interval() -> None:
    """All resamples of four networks in a row have a tau of 1, which is no certainty."""
    few, enough = (Study(rows([[float(k)] for k in range(n)], params=[float(k) for k in range(n)])) for n in (7, 8))
    assert few.kendall_tau["params"] == Estimate(1.0, -1.0, 1.0)
    given = [float(k) for k in range(7)]
    both = Study(rows([[k] for k in given], params=given, length_distortion=given, ntk_condition=given[::-1]))
    assert both.gain["params"] == Estimate(0.0, -2.0, 2.0)
    assert enough.kendall_tau["params"] == Estimate(1.0, 1.0, 1.0)


def test_an_interval_of_few_resamples_is_none() -> None:
    """One network of twelve differs: a third of the resamples do not have it, and have no tau."""
    result = Study(rows([[float(k)] for k in range(12)], params=[0.0] * 11 + [1.0]))
    assert result.kendall_tau["params"].value > 0
    assert (result.kendall_tau["params"].low, result.kendall_tau["params"].high) == (-1.0, 1.0)


def test_rows_that_lack_something_are_refused() -> None:
    with pytest.raises(InputError, match="one topology or more, got none"):
        Study([])
    good = {"measures": {"params": 1.0}, "top1": [1.0]}
    for wrong, missing in (({"top1": [1.0]}, "measures"), ({"measures": {}, "top1": [1.0]}, "measures")):
        with pytest.raises(InputError, match=f"row 1 of the study lacks {missing}"):
            Study([good, wrong])
    alone = Study([good] * 9)
    assert str(alone.gain["params"]) == "none" and math.isnan(alone.seconds["params"])
    assert set(alone.to_dict()["measures"]) == {"params"}


@pytest.mark.parametrize(
    ("accuracies", "remark"),
    [
        ([math.nan] * 9, "Every training diverged"),
        ([70.0], "One topology has no order"),
        ([100.0] * 9, "several classes"),
        ([0.1, 0.2, 0.3], "Fewer than 8 topologies"),
        ([*range(9), math.nan], "1 diverged; they rank last"),
    ],
)
def test_what_cannot_be_told_is_said(accuracies: list[float], remark: str) -> None:
    result = Study(rows([[float(value)] for value in accuracies], params=[float(k) for k in range(len(accuracies))]))
    assert remark in " ".join(remarks(result))
    assert "nan" not in describe(result, Accuracies(percent=True))


def test_accuracies_of_elsewhere_have_no_unit() -> None:
    result = Study(rows([[0.5 + k / 100] for k in range(9)], params=[float(k) for k in range(9)]))
    text = describe(result, Accuracies(percent=False))
    assert "accuracy from 0.5 to 0.58, mean 0.54; a random pick is 0.04 behind the best." in text
    assert "%" not in text.splitlines()[-1]


@pytest.mark.parametrize("several", [1, 3])
def test_the_ceiling_is_that_of_the_accuracies_that_are_compared(several: int) -> None:
    """The tau of the true accuracies with means of ``several`` noisy ones, lines in any order."""
    generator = np.random.default_rng(7)
    truth = generator.normal(70, 2, 2000)
    noisy = np.sort(truth[:, None] + generator.normal(0, 2, (2000, several)), 1)  # the best line last
    few = noisy.tolist()
    if several == 1:  # a few with a second one tell the noise
        few = [[*row, float(truth[k] + generator.normal(0, 2))] if k < 1000 else row for k, row in enumerate(few)]
    noise = Study(rows(few)).noise
    assert noise is not None and noise.within == pytest.approx(2, rel=0.1)
    reached = stats.kendalltau(truth, [np.mean(row) for row in few]).statistic
    assert noise.ceiling == pytest.approx(reached, abs=0.03)


def test_measures_of_your_own() -> None:
    given = [{"measures": {"mine": float(k), "params": 1.0}, "top1": [float(k)]} for k in range(9)]
    result = Study(given)
    assert result.kendall_tau["mine"].value == pytest.approx(1) and set(result.kendall_tau) == {"params", "mine"}
    assert repr(result) == "Study(9 topologies, 2 measures)"


@pytest.mark.parametrize("wrong", ["run", {"a": 1}, [3], [{"measures": {"params": None}, "top1": [1.0]}], 7])
def test_what_are_no_rows_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(InputError, match="study"):
        Study(wrong)


def test_few_repeated_networks_set_no_ceiling() -> None:
    for repeated, said in ((4, "too few to say"), (5, "a perfect measure would reach")):
        accuracies = [[float(k), k + 0.5] if k < repeated else [float(k)] for k in range(12)]
        assert said in " ".join(remarks(Study(rows(accuracies))))
