import json
import math
from pathlib import Path

import pytest
import torch
from search_program import measures

from asvit_fast.cost import Cost, topology_cost
from asvit_fast.errors import InputError
from asvit_fast.search import Budget, reward_sequence, search
from asvit_fast.topology import SearchSpace, Topology

QUIET = {"progress": False, "device": "cpu"}


def exported_cost(topology: Topology) -> Cost:
    return topology_cost(topology, pos_embed="absolute")


def without_seconds(trace: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in trace]


def test_a_search_finds_what_the_scorer_likes() -> None:
    result = search(steps=500, scorer=measures, **QUIET)
    assert result.trace[0]["entropy"] == pytest.approx(15.33, abs=5e-3)
    assert result.entropy < 9
    generator = torch.Generator().manual_seed(0)
    lengths = [measures(SearchSpace().sample(generator))["length_distortion"] for _ in range(200)]
    assert measures(result.topology)["length_distortion"] > sorted(lengths)[160]


def test_trace_and_result(tmp_path: Path) -> None:
    result = search(steps=12, scorer=measures, out=tmp_path / "a" / "run", **QUIET)
    folder = tmp_path / "a" / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "trace.jsonl",
        "state.pt",
        "result.json",
        "top.csv",
        "starts.jsonl",
        ".lock",
    }
    assert json.loads((folder / "config.json").read_text())["kind"] == "search"
    stored = json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    assert set(stored) == {
        "kind", "topology", "length_distortion", "ntk_condition", "params", "flops", "steps", "entropy", "best_sampled"
    }  # fmt: skip
    assert len(result.trace) == 12
    assert set(result.trace[0]) == {
        "step", "topology", "action", "length_distortion", "ntk_condition", "reward", "baseline", "log_prob", "entropy",
        "most_probable", "params", "flops", "seconds", "rejected",
    }  # fmt: skip
    for record in result.trace:
        topology = Topology.parse(record["topology"])
        assert SearchSpace().topology(record["action"]) == topology
        cost = exported_cost(topology)
        assert (record["params"], record["flops"]) == (cost.params, cost.flops)
        assert record["length_distortion"] == measures(topology)["length_distortion"]
    columns = ([record[name] for record in result.trace] for name in ("length_distortion", "ntk_condition"))
    assert [record["reward"] for record in result.trace] == reward_sequence(*columns, convention="paper")
    assert result.trace[-1]["most_probable"] == str(result.topology)


def test_same_seed_same_trace_other_seed_other_trace() -> None:
    first, second, third = (search(steps=6, scorer=measures, seed=seed, **QUIET) for seed in (5, 5, 6))
    assert without_seconds(first.trace) == without_seconds(second.trace)
    assert torch.equal(first.policy.logits, second.policy.logits)
    assert without_seconds(first.trace) != without_seconds(third.trace)


def test_a_finished_run_is_read_not_repeated(tmp_path: Path) -> None:
    first = search(steps=5, scorer=measures, out=tmp_path, **QUIET)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def never(_: Topology) -> dict[str, float]:
        raise AssertionError("a finished run scores nothing")

    again = search(steps=5, scorer=never, out=tmp_path, **QUIET)
    assert again == first
    assert torch.equal(again.policy.logits, first.policy.logits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"lr": 0.1}, "lr is 0.08 there and 0.1 here"),
        ({"space": SearchSpace().narrow(K1=(8,))}, r"K1 is \[4, 5, 6, 7, 8\] there and \[8\] here"),
        ({"budget": Budget(params=(0, 3e6))}, "budget.params is null there"),
        ({"convention": "reference", "steps": 6}, "steps is 5 there and 6 here, .*convention is"),
    ],
)
def test_another_configuration(tmp_path: Path, change: dict, message: str) -> None:
    options = {"steps": 5, "scorer": measures, "out": tmp_path, **QUIET}
    search(**options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        search(**{**options, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_budget_rejects_before_scoring() -> None:
    scored: list[Topology] = []

    def scorer(topology: Topology) -> dict[str, float]:
        scored.append(topology)
        return measures(topology)

    budget = Budget(params=(1.9e6, 2.1e6), flops=(None, 450e6))
    result = search(steps=40, scorer=scorer, budget=budget, **QUIET)
    assert all(budget.reject(exported_cost(topology)) is None for topology in scored)
    assert budget.reject(exported_cost(result.topology)) is None
    assert len(scored) == 41
    rejected = [entry for record in result.trace for entry in record["rejected"]]
    assert rejected
    for entry in rejected:
        cost = exported_cost(Topology.parse(entry["topology"]))
        assert entry["reason"] == budget.reject(cost)
        assert not (1.9e6 <= cost.params <= 2.1e6 and cost.flops <= 450e6)


def test_a_policy_that_left_the_budget_does_not_stall() -> None:
    # Rewarding size drives the policy to the largest networks, nearly all of which are too large.
    def scorer(topology: Topology) -> dict[str, float]:
        return {"length_distortion": float(topology_cost(topology).params), "ntk_condition": 1.0}

    budget = Budget(params=(None, 2.2e6))
    result = search(steps=150, scorer=scorer, budget=budget, lr=0.5, **QUIET)
    assert all(record["params"] <= 2.2e6 for record in result.trace)
    assert result.params <= 2.2e6


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(params=(None, 1e5)), "params must be at most 100,000.*width 32 have [0-9,]* to [0-9,]* parameters"),
        (Budget(params=(1e9, None)), "params must be at least 1,000,000,000"),
        (Budget(flops=(1e12, 2e12)), "flops must be at least 1,000,000,000,000 and at most 2,"),
        (Budget(params=(2_000_001, 2_000_002)), "none of 20,000"),
    ],
)
def test_impossible_budgets(tmp_path: Path, budget: Budget, message: str) -> None:
    def never(_: Topology) -> dict[str, float]:
        raise AssertionError("nothing is scored for an impossible budget")

    with pytest.raises(InputError, match=message):
        search(steps=5, scorer=never, budget=budget, out=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_small_space_is_searched_exhaustively_for_the_budget() -> None:
    single = {
        "K2": (4,),
        "K3": (4,),
        "K4": (4,),
        "E2": (2,),
        "E3": (2,),
        "E4": (2,),
        "S1": (2,),
        "S2": (1,),
        "S3": (1,),
    }
    space = SearchSpace().narrow(**single, heads=(16,))
    costs = sorted(exported_cost(topology).params for topology in space.enumerate())
    exact = Budget(params=(costs[7], costs[7]))
    result = search(space, steps=3, scorer=measures, budget=exact, **QUIET)
    assert result.params == costs[7]
    with pytest.raises(InputError, match=f"none of {space.size} topologies"):
        search(space, steps=3, scorer=measures, budget=Budget(params=(costs[7] + 1, costs[8] - 1)), **QUIET)


@pytest.mark.parametrize(
    "windows", [{"params": (2, 1)}, {"flops": (-1, 5)}, {"params": 5}, {"params": (1, 2, 3)}, {"flops": (math.nan, 1)}]
)
def test_bad_budgets(windows: dict) -> None:
    with pytest.raises(InputError, match=r"budget: (params|flops)"):
        Budget(**windows)


def test_open_ends() -> None:
    assert Budget(params=(0, math.inf)).params == (0, None)
    assert Budget(params=None).reject(topology_cost(SearchSpace().topology([0] * 12))) is None


def test_non_finite_measures_are_recorded_and_survive(tmp_path: Path) -> None:
    def scorer(topology: Topology) -> dict[str, float]:
        bad = topology.stages[0].kernel % 2
        return {"length_distortion": math.nan if bad else 1.0 + topology.heads, "ntk_condition": math.inf}

    options = {"steps": 20, "scorer": scorer, "out": tmp_path, **QUIET}
    result = search(**options)
    assert all(record["ntk_condition"] == math.inf for record in result.trace)
    assert all(math.isfinite(record["reward"]) for record in result.trace)
    assert '"inf"' in (tmp_path / "trace.jsonl").read_text()
    assert bool(result.policy.logits.isfinite().all())
    assert search(**options).ntk_condition == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"seed": -1}, "seed"),
        ({"repeats": 0}, "repeats"),
        ({"convention": "both"}, "convention"),
        ({"history": 0}, "history"),
        ({"lr": -1.0}, "lr"),
        ({"img_size": 8}, "img_size"),
        ({"width": 4}, "heads"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"scorer": lambda t: 3.0}, "scorer must return a mapping"),
        ({"out": "/proc/asvit"}, "/proc/asvit cannot be written"),
        ({"out": "/dev/null/run"}, "/dev/null/run cannot be written"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        search(**{"steps": 3, "scorer": measures, **QUIET, **options})
    assert "\n" not in str(caught.value)


def test_real_scores_with_images(tmp_path: Path) -> None:
    options = {"steps": 2, "img_size": 32, "repeats": 2, "thetas": 3, "batch": 3, "out": tmp_path, **QUIET}
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # [batch, 3, H, W]
    result = search(images=images, **options)
    assert result.ntk_condition > 1
    assert result.length_distortion > 0
    assert search(images=images.clone(), **options) == result
    noise = search(**{**options, "out": None})
    assert noise.trace[0]["topology"] == result.trace[0]["topology"]
    assert noise.trace[0]["length_distortion"] == result.trace[0]["length_distortion"]
    assert noise.trace[0]["ntk_condition"] != result.trace[0]["ntk_condition"]
    for other in (images + 1, None):
        with pytest.raises(InputError, match="images is"):
            search(images=other, **options)
    with pytest.raises(InputError, match="images"):
        search(images=images[:2], **options)
    with pytest.raises(InputError, match="no/such/folder"):
        search(images="no/such/folder", **options)
