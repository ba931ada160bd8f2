"""Searches and growths by other rules than the paper's, budgets of latency, and their comparison in a report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search_program import measures

import asvit_fast as af
from asvit_fast.errors import InputError
from asvit_fast.latency import LATENCY, LatencyModel, keys, latency_model
from asvit_fast.report import report
from asvit_fast.report.comparison_plots import moving_mean
from asvit_fast.scoring import percentile as percentiles
from asvit_fast.scoring.percentile import percentile
from asvit_fast.search import Budget, scale, search
from asvit_fast.search.evolution import POPULATION
from asvit_fast.settings import SCALE_RULES, SEARCH_RULES, ScoreSettings
from asvit_fast.topology import SearchSpace, Topology

QUIET: dict[str, Any] = {"progress": False, "device": "cpu", "scorer": measures}
SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
SMALL = SearchSpace().narrow(K1=(4, 8), K2=(2,), K3=(2,), K4=(2,), S1=(2,), S2=(1,), S3=(1,), heads=(16,))


def without_seconds(trace: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in trace]


# ------------------------------------------------------------------ growth


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_a_growth_takes_the_same_steps_by_every_rule_and_resumes(tmp_path: Path, rule: str) -> None:
    options = {**QUIET, "max_params": 8e6, "rule": rule, "seed": 3}
    steps = scale(SEED, out=tmp_path / "whole", **options)
    before = Topology.parse(SEED)
    for step in steps:
        assert sum(step.topology.depths) == sum(before.depths) + 1
        assert 1.05 - 1 / before.width <= step.topology.width / before.width <= 1.2 + 1 / before.width
        assert step.params <= 8e6
        assert len(step.candidates) == 1 or rule == "scores"
        before = step.topology
    scale(SEED, out=tmp_path / "parts", max_steps=2, **options)
    again = scale(SEED, out=tmp_path / "parts", **options)
    assert [str(step.topology) for step in again] == [str(step.topology) for step in steps]


def test_rules_grow_as_their_names_say() -> None:
    ends = {rule: scale(SEED, max_params=30e6, rule=rule, **QUIET)[-1].topology for rule in SCALE_RULES}
    assert ends["swin"].depths[2] == max(ends["swin"].depths) >= 2 * ends["swin"].depths[0]
    assert max(ends["uniform"].depths) - min(ends["uniform"].depths) <= 1
    assert ends["vit"].width > ends["uniform"].width > ends["resnet"].width
    assert sum(ends["vit"].depths) < sum(ends["uniform"].depths) < sum(ends["resnet"].depths)
    other = scale(SEED, max_params=30e6, rule="random", seed=1, **QUIET)[-1].topology
    assert other != ends["random"]


def test_a_growth_of_another_rule_is_another_run(tmp_path: Path) -> None:
    scale(SEED, max_params=4e6, rule="swin", out=tmp_path, **QUIET)
    with pytest.raises(InputError, match='rule is "swin" there and "vit" here'):
        scale(SEED, max_params=4e6, rule="vit", out=tmp_path, **QUIET)
    with pytest.raises(InputError, match="rule must be one of scores, random"):
        scale(SEED, rule="best", **QUIET)


def test_a_rule_goes_on_where_measures_are_not_finite() -> None:
    nothing = {**QUIET, "scorer": lambda topology: {"length_distortion": 1.0, "ntk_condition": float("inf")}}
    assert scale(SEED, max_params=4e6, rule="uniform", **nothing)
    with pytest.raises(InputError, match="finite measures"):
        scale(SEED, max_params=4e6, **nothing)


# ------------------------------------------------------------------ search


@pytest.mark.parametrize("rule", ["random", "evolution"])
def test_a_search_by_another_rule_resumes_and_ends_with_its_best(tmp_path: Path, rule: str) -> None:
    steps = POPULATION + 20
    result = search(steps=steps, rule=rule, out=tmp_path / "whole", topk=4, **QUIET)
    assert result.topology == result.best_sampled.topology and result.entropy is None
    search(steps=POPULATION + 3, rule=rule, out=tmp_path / "parts", **QUIET)
    again = search(steps=steps, rule=rule, out=tmp_path / "parts", **QUIET)
    assert without_seconds(again.trace) == without_seconds(result.trace)
    with open(tmp_path / "whole" / "top.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["place"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["topology"] == str(result.best_sampled.topology)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["rule"] == rule


def test_random_search_is_the_baseline_and_evolution_beats_it() -> None:
    found = {rule: search(steps=200, rule=rule, **QUIET) for rule in ("random", "evolution")}
    baseline = search(steps=200, baseline="random", **QUIET).baseline
    assert [r["topology"] for r in found["random"].trace] == [r["topology"] for r in baseline.trace]
    means = {rule: sum(r["length_distortion"] for r in one.trace[-50:]) / 50 for rule, one in found.items()}
    assert means["evolution"] > 1.1 * means["random"]
    children = found["evolution"].trace[POPULATION:]
    parents = [SearchSpace.choices_of(Topology.parse(r["topology"])) for r in found["evolution"].trace]
    for place, record in enumerate(children, start=POPULATION):
        child = SearchSpace.choices_of(Topology.parse(record["topology"]))
        population = parents[place - POPULATION : place]
        assert any(sum(child[name] != parent[name] for name in child) <= 1 for parent in population)


# ------------------------------------------------------------------ latency


def test_a_latency_is_the_sum_of_blocks_that_are_measured_once(tmp_path: Path) -> None:
    model = latency_model(SMALL, 16, 32, path=tmp_path / LATENCY)
    wanted = {key for topology in SMALL.enumerate(16) for key, _ in keys(topology)}
    assert set(model.pieces) == wanted and all(value > 0 for value in model.pieces.values())
    deep = Topology.parse("4,2,2,1|2,1,2,3|2,1,2,1|2,1,2,1|16,16")
    flat = deep.replace(depths=(1, 1, 1, 1))
    block = model.pieces["block 2 splits 1 expansion 2 heads 16"]
    assert model(deep) == pytest.approx(model(flat) + 2 * block)
    assert len(model.checks) == 6 and model.error >= abs(model.bias)
    assert latency_model(SMALL, 16, 32, path=tmp_path / LATENCY) == model  # read, not measured
    with pytest.raises(InputError, match="batch_size is 1 there and 2 here"):
        latency_model(SMALL, 16, 32, batch_size=2, path=tmp_path / LATENCY)
    with pytest.raises(InputError, match=r"kernel 5 of .* was not measured"):
        model(Topology.parse("5,2,2|2,1,2|2,1,2|2,1,2|16,16"))
    (tmp_path / LATENCY).write_text("{}")
    with pytest.raises(InputError, match="delete it to measure anew"):
        latency_model(SMALL, 16, 32, path=tmp_path / LATENCY)


def test_a_search_keeps_to_a_latency(tmp_path: Path) -> None:
    pieces = {key: 1.0 for topology in SMALL.enumerate(32) for key, _ in keys(topology)}
    pieces |= {key: 3.0 for key in pieces if "expansion 6" in key}  # a block of expansion 6 takes 3 ms, others 1 ms
    model = LatencyModel(1, (224, 224), 32, "cpu", pieces, [(8.0, 10.0)])
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / LATENCY).write_text(json.dumps(model.to_dict()))
    with pytest.warns(UserWarning, match="missed by 20 % on average .-20 % with sign"):
        result = search(space=SMALL, steps=40, budget=Budget(latency_ms=(None, 11)), out=tmp_path, **QUIET)
    assert {record["latency_ms"] for record in result.trace} == {9.0, 11.0}
    assert any("13 ms > 11" in reject["reason"] for record in result.trace for reject in record["rejected"])
    page = report(tmp_path)
    assert (tmp_path / "search_pareto.png").stat().st_size < 300_000 and page.exists()
    with pytest.raises(InputError, match=r"latency_ms must be at least 1 and at most 2, but .* have 9 to 17 ms"):
        search(space=SMALL, steps=3, budget=Budget(latency_ms=(1, 2)), out=tmp_path, **QUIET)


# ------------------------------------------------------------------ percentile


def test_a_percentile_counts_random_topologies_with_worse_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"length_distortion": [1.0, 2.0, 2.0, 3.0], "ntk_condition": [5.0, 6.0, 7.0, 8.0]}
    monkeypatch.setattr(percentiles, "stored_sample", lambda: {"64x64": {"scores": scores}})
    settings, topology = ScoreSettings(img_size=64), Topology.parse(SEED)
    assert percentile("length_distortion", 2.0, topology, settings) == 50
    assert percentile("length_distortion", 9.0, topology, settings) == 100
    assert percentile("ntk_condition", 5.5, topology, settings) == 75
    assert percentile("ntk_condition", float("inf"), topology, settings) == 0
    for other in (
        (topology.replace(width=64), settings),
        (topology.replace(depths=(2, 1, 1, 1)), settings),
        ("resnet18", settings),
        (topology, ScoreSettings(img_size=96)),
        (topology, ScoreSettings(img_size=64, convention="reference")),
        (topology, ScoreSettings(img_size=64, thetas=5)),
    ):
        assert percentile("length_distortion", 2.0, *other) is None
    # the sample is of normal noise, and only the NTK depends on the images
    assert percentile("ntk_condition", 5.5, topology, settings, noise=False) is None
    assert percentile("length_distortion", 2.0, topology, settings, noise=False) == 50
    options: dict[str, Any] = {"metrics": ("length_distortion", "ntk_condition"), "img_size": 64, "device": "cpu"}
    found = af.score(topology, repeats=1, images=torch.rand(16, 3, 64, 64), **options)
    assert found["ntk_condition"].percentile is None and found["length_distortion"].percentile is not None


def test_the_stored_sample_is_whole() -> None:
    for size, part in percentiles.stored_sample().items():
        assert len({len(values) for values in part["scores"].values()}) == 1, size
        assert set(part["scores"]) == set(percentiles.LARGER_IS_BETTER)


# ------------------------------------------------------------------ report


def test_a_report_compares_rules(tmp_path: Path) -> None:
    for seed in range(2):
        for rule in SCALE_RULES:
            scale(SEED, max_params=6e6, rule=rule, seed=seed, out=tmp_path / f"{rule}-{seed}", **QUIET)
        for rule in SEARCH_RULES:
            search(steps=30, rule=rule, seed=seed, out=tmp_path / f"search-{rule}-{seed}", **QUIET)
    page = report(tmp_path).read_text()
    assert "Growths compared" in page and "Searches compared" in page and "Agreement of searches" in page
    for name in ("scale_compared.png", "search_compared.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 300_000
    assert "agreement of searches (reinforce, 2 seeds)" in page.lower() and "not compared" not in page
    single = report(tmp_path / "search-random-0").read_text()
    assert "entropy of the policy at the end" not in single


def test_a_report_does_not_mix_runs_of_other_options(tmp_path: Path) -> None:
    """Other budgets are groups of their own, equal seeds are counted, what cannot be compared is named."""
    for name, steps, seed in (("a", 3, 0), ("b", 3, 0), ("c", 5, 0), ("d", 5, 1), ("f", 5, 2)):
        search(steps=steps, seed=seed, out=tmp_path / name, **QUIET)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text('{"kind": "study"}')
    (tmp_path / "f" / "result.json").unlink()
    (tmp_path / "d" / "trace.jsonl").write_text("no json")
    page = report(tmp_path).read_text()
    for text in ("<td>reinforce, steps 3</td><td>1 seed</td>", "<td>reinforce, steps 5</td><td>1 seed</td>"):
        assert text in page
    assert "2 runs; not compared: b (as a), d (damaged), e (study), f (not finished)" in page
    for name in "abc":
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match=r"no finished search or scale runs to compare, but d .*; give one of them"):
        report(tmp_path)


def test_short_searches_have_curves() -> None:
    assert [len(moving_mean(np.arange(steps, dtype=float))[0]) for steps in (1, 4, 12, 500)] == [1, 4, 10, 481]


def test_options_of_the_policy_have_no_effect_without_one() -> None:
    with pytest.warns(UserWarning, match="no effect with rule random, which has no policy: lr, history"):
        search(steps=1, rule="random", lr=0.5, history=9, **QUIET)
    with pytest.warns(UserWarning, match="evolution begins with 50 random topologies: in 2 steps it is random"):
        search(steps=2, rule="evolution", **QUIET)
    with pytest.warns(UserWarning, match="no effect without latency_ms: batch_size"):
        search(steps=1, batch_size=4, **QUIET)
    with pytest.warns(UserWarning, match="no effect: baseline random"):
        search(steps=1, rule="random", baseline="random", **QUIET)


def test_draws_do_not_depend_on_the_rule_of_torch() -> None:
    """Searches draw from generators of their own."""
    torch.manual_seed(0)
    first = search(steps=5, rule="random", **QUIET)
    torch.manual_seed(1)
    assert without_seconds(search(steps=5, rule="random", **QUIET).trace) == without_seconds(first.trace)
