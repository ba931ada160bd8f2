"""The topologies beside the most probable one: the best sampled one, and random search at the same cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_run_changes import Counting, Killed, contents, measures, run_search

from asvit_fast.errors import InputError
from asvit_fast.search import Budget, ScoredTopology, best_sampled
from asvit_fast.topology import SearchSpace, Topology


def record(topology: str, length: float, ntk: float, step: int) -> dict:
    return {
        "topology": topology, "length_distortion": length, "ntk_condition": ntk, "step": step, "params": 1, "flops": 2
    }  # fmt: skip


A, B, C = (f"{kernel},2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,32" for kernel in (6, 7, 8))


def test_best_sampled() -> None:
    best = best_sampled([record(A, 5, 9, 0), record(B, 9, 20, 1), record(C, 7, 4, 2)])  # ranks 2+1, 0+2, 1+0
    assert best == ScoredTopology(Topology.parse(C), 7, 4, 1, 2, (2,))
    assert str(best) == C
    assert best_sampled([record(A, 5, 9, 0), record(B, 4, 9, 1), record(A, 2, 9, 2)]).topology == Topology.parse(B)
    assert best_sampled([record(A, 5, 9, 0), record(A, 2, 7, 2)]) == ScoredTopology(
        Topology.parse(A), 3.5, 8.0, 1, 2, (0, 2)
    )
    assert best_sampled([record(A, math.inf, 9, 0), record(B, 1, "inf", 1)]) is None
    assert best_sampled([record(A, math.nan, 9, 0), record(B, 1, 99, 1)]).topology == Topology.parse(B)


def test_best_is_the_better_scored(tmp_path: Path) -> None:
    result = run_search(tmp_path, steps=20)
    assert result.most_probable.topology == result.topology
    assert result.most_probable.ntk_condition == measures(result.topology)["ntk_condition"]
    sampled = result.best_sampled
    assert sampled is not None
    assert sampled == best_sampled(result.trace)
    assert str(sampled) in [step["topology"] for step in result.trace]
    assert all(result.trace[step]["topology"] == str(sampled) for step in sampled.steps)
    assert result.best in (sampled, result.most_probable)
    other = sampled if result.best == result.most_probable else result.most_probable
    assert (result.best.length_distortion > other.length_distortion) or (
        result.best.ntk_condition < other.ntk_condition
    )
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["best_sampled"] == sampled.to_dict()
    assert stored["topology"] == str(result.topology)
    nothing = run_search(None, lambda _: {"length_distortion": 1.0, "ntk_condition": math.inf}, steps=3)
    assert nothing.best_sampled is None
    assert nothing.best == nothing.most_probable


def test_random_baseline(tmp_path: Path) -> None:
    """As many topologies as the search scored, uniform within the budget, the same after kills and when added later."""
    budget = Budget(params=(2_000_000, 2_400_000))
    scorer = Counting()
    expected = run_search(None, scorer, baseline="random", budget=budget)
    assert scorer.calls == 9 + 1 + 9
    drawn = [step["topology"] for step in expected.baseline.trace]
    assert len(set(drawn)) > 5
    assert set(drawn).isdisjoint(step["topology"] for step in expected.trace)
    assert all(Topology.parse(topology) in SearchSpace() for topology in drawn)
    assert all(2_000_000 <= step["params"] <= 2_400_000 for step in expected.baseline.trace)
    assert expected.baseline.best == best_sampled(expected.baseline.trace)

    plain = run_search(tmp_path, budget=budget)
    assert plain.baseline is None
    before = contents(tmp_path)
    with pytest.raises(Killed):
        run_search(tmp_path, Counting(4), baseline="random", budget=budget)
    assert contents(tmp_path) == before
    with open(tmp_path / "baseline" / "trace.jsonl", "a") as trace:
        trace.write('{"step": 4, "topo')
    rest = Counting()
    found = run_search(tmp_path, rest, baseline="random", budget=budget)
    assert rest.calls == 5
    assert [{**step, "seconds": 0} for step in found.baseline.trace] == [
        {**step, "seconds": 0} for step in expected.baseline.trace
    ]
    result = json.loads((tmp_path / "baseline" / "result.json").read_text())
    assert result == {"kind": "baseline", "steps": 9, "best": expected.baseline.best.to_dict()}
    longer, alone = run_search(tmp_path, baseline="random", budget=budget, steps=11), Counting()
    assert longer.baseline.best == run_search(None, alone, baseline="random", budget=budget, steps=11).baseline.best
    assert longer.baseline.trace[:9] == found.baseline.trace


def test_a_baseline_that_was_changed_is_refused(tmp_path: Path) -> None:
    run_search(tmp_path, baseline="random", steps=3)
    trace = tmp_path / "baseline" / "trace.jsonl"
    first, *others = trace.read_text().splitlines(keepends=True)
    trace.write_text("".join([first.replace('"step": 0', '"step": "0"'), *others]))
    with pytest.raises(InputError, match=r"baseline/trace.jsonl, line 1: has step '0' instead of 0"):
        run_search(tmp_path, baseline="random", steps=3)
    with pytest.raises(InputError, match="'random' or None, got 'grid'"):
        run_search(None, baseline="grid")


@pytest.mark.parametrize(
    ("window", "idle"), [((None, 4e6), True), ((0, None), True), ((None, 2.5e6), False), ((1.5e6, 9e6), False)]
)
def test_a_budget_that_excludes_nothing(window: tuple, idle: bool, recwarn: pytest.WarningsRecorder) -> None:
    run_search(None, steps=1, budget=Budget(params=window))
    messages = [str(warning.message) for warning in recwarn]
    assert (
        any(
            "excludes nothing, as the topologies of the space at width 32 have 1,300,712 to 2,525,032" in m
            for m in messages
        )
        is idle
    )
