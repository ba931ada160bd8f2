import json
import math
from pathlib import Path

import pytest
import timm

from asvit_fast.cost import topology_cost
from asvit_fast.errors import InputError
from asvit_fast.search import scale
from asvit_fast.search.evaluation import Measures
from asvit_fast.search.scaling import choose, grown
from asvit_fast.topology import Topology

GOLDEN = json.loads((Path(__file__).parent / "data" / "search.json").read_text())["growth"]
SEED = Topology.parse("8,2,3|4,1,2|4,1,4|4,1,6|32")
QUIET = {"progress": False, "device": "cpu"}


def measures(topology: Topology) -> dict[str, float]:
    length = sum((i + 2) * s.depth for i, s in enumerate(topology.stages)) + math.sqrt(topology.width)
    return {"length_distortion": length, "ntk_condition": 100 / topology.width + topology.depths[0]}


def golden_scorer(case: dict) -> object:
    scores = {
        (tuple(depths), width): {"ntk_condition": ntk, "length_distortion": length}
        for step in case["trajectory"]
        for depths, width, ntk, length in step.get("candidates", [])
    }
    return lambda candidate: scores[candidate.depths, candidate.width]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['score']}-{case['param_lim'][0]}")
def test_golden_trajectories(case: dict) -> None:
    limits = tuple(1e6 * limit for limit in case["param_lim"])
    expected = [step for step in case["trajectory"] if "depth" in step]
    cut_off = case["trajectory"][-1].get("stopped", "").startswith("cut off")
    steps = scale(
        case["arch"],
        max_params=limits,
        convention="reference",
        scorer=golden_scorer(case),
        max_steps=len(expected) if cut_off else None,
        **QUIET,
    )
    assert len(steps) == len(expected)
    for step, wanted in zip(steps, expected, strict=True):
        order = [
            (list(c.topology.depths), c.scored_width, c.ntk_condition, c.length_distortion) for c in step.candidates
        ]
        assert order == [tuple(candidate) for candidate in wanted["candidates"]]
        assert (list(step.topology.depths), step.topology.width) == (wanted["depth"], 4 * wanted["hidden"])
        assert step.params == round(wanted["params_M"] * 1e6)
        assert step.chosen.ntk_condition == wanted["ntk"]


def test_paper_candidates() -> None:
    candidates = grown(SEED)
    assert len(candidates) == 16
    assert [c.width for c in candidates[:4]] == [34, 35, 37, 38]
    assert [c.depths for c in candidates[::4]] == [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
    for width in range(8, 40):
        widths = [c.width for c in grown(SEED.replace(width=width))[:4] if c.depths == (2, 1, 1, 1)]
        assert all(width < w <= width * 1.2 + 1 for w in widths)
        assert len(set(widths)) == len(widths)


def test_reference_candidates_may_keep_the_width() -> None:
    widths = {
        h: sorted({c.width // 4 for c in grown(SEED.replace(width=4 * h), "reference", 4)}) for h in (8, 11, 22, 29)
    }
    assert widths == {8: [8, 9, 10], 11: [12, 13], 22: [23, 24, 25, 26], 29: [30, 32, 33, 35]}


def test_dense_ranks_and_ties() -> None:
    tied = [Measures(5.0, 10.0), Measures(8.0, 40.0), Measures(5.0, 10.0), Measures(1.0, 50.0)]
    assert choose(tied)[1] == [1, 1, 1, 4]
    # All of the first three tie; ntk varies by (50 - 10) / 50 = 0.8, length by 7 / 8: length decides.
    assert choose(tied, "paper")[0] == 1  # the larger length
    assert choose(tied, "reference")[0] == 0  # the authors' rule: the smaller value
    beyond = [Measures(5.0, 10.0), Measures(5.0, 10.0), Measures(8.0, 40.0), Measures(1.0, 50.0)]
    assert choose(beyond, "paper")[0] == 2
    assert choose(beyond, "reference")[0] == 0  # which looks at the first two only


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_candidates_never_win(bad: float) -> None:
    for convention in ("paper", "reference"):
        rows = [Measures(bad, 1.0), Measures(9.0, bad), Measures(1.0, 50.0), Measures(2.0, 60.0)]
        winner, sums = choose(rows, convention)
        assert winner in (2, 3)
        assert sums[:2] == [None, None]
        assert choose([Measures(bad, 1.0)], convention) == (None, [None])


def test_all_non_finite_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="none of the 16 candidates of step 0"):
        scale(SEED, scorer=lambda t: {"length_distortion": 1.0, "ntk_condition": math.inf}, **QUIET)


def test_a_single_number_is_never_exceeded() -> None:
    for convention in ("paper", "reference"):
        steps = scale(SEED, max_params=12e6, scorer=measures, convention=convention, **QUIET)
        assert all(step.params <= 12e6 for step in steps)
        last = steps[-1].topology
        shrink = 4 if convention == "reference" else 1
        pos_embed = "none" if convention == "reference" else "absolute"

        def counted(topology: Topology, pos_embed: str = pos_embed) -> int:
            return topology_cost(topology, pos_embed=pos_embed).params

        assert all(counted(c) > 12e6 for c in grown(last, convention, shrink))  # nothing else fitted
        assert any(step.dropped for step in steps)
        assert "12,000,000" in next(step for step in steps if step.dropped).dropped[0]["reason"]
        assert [step.params for step in steps] == [counted(step.topology) for step in steps]


def test_the_pair_stops_at_its_first_number() -> None:
    steps = scale(SEED, max_params=(6e6, 12e6), scorer=measures, **QUIET)
    assert steps[-2].params < 6e6 <= steps[-1].params <= 12e6


@pytest.mark.parametrize("img_size", [64, (96, 160)])
def test_the_limit_holds_for_the_exported_network(img_size: int | tuple[int, int]) -> None:
    """At the run's image size, position embedding included; the authors count without it."""
    for convention, pos_embed in (("paper", "absolute"), ("reference", "none")):
        step = scale(SEED, scorer=measures, convention=convention, max_steps=1, img_size=img_size, **QUIET)[0]
        model = timm.create_model("asvit", topology=str(step.topology), img_size=img_size, pos_embed=pos_embed)
        assert step.params == sum(weight.numel() for weight in model.parameters())
        candidate = max(
            step.candidates, key=lambda one: one.params
        )  # it fits exactly, and one parameter less is too few
        for limit, fits in ((candidate.params, True), (candidate.params - 1, False)):
            again = scale(SEED, limit, scorer=measures, convention=convention, max_steps=1, img_size=img_size, **QUIET)[
                0
            ]
            assert (candidate.topology in [one.topology for one in again.candidates]) is fits


def test_scored_widths() -> None:
    seen: list[int] = []

    def scorer(topology: Topology) -> dict[str, float]:
        seen.append(topology.width)
        return measures(topology)

    step = scale(SEED, scorer=scorer, max_steps=1, **QUIET)[0]
    assert seen == [c.topology.width for c in step.candidates]
    seen.clear()
    step = scale(SEED, scorer=scorer, max_steps=1, shrink=4, **QUIET)[0]
    assert seen == [c.scored_width for c in step.candidates] == [c.topology.width // 4 for c in step.candidates]


def test_run_directory(tmp_path: Path) -> None:
    options = {"max_params": 8e6, "scorer": measures, "seed": 1, **QUIET}
    steps = scale(SEED, out=tmp_path, **options)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {
        "kind": "scale",
        "start": str(SEED),
        "topology": str(steps[-1].topology),
        "params": steps[-1].params,
        "flops": steps[-1].flops,
        "steps": len(steps),
    }
    records = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert records == [step.to_dict() for step in steps]
    assert set(records[0]) == {"step", "candidates", "dropped", "topology", "params", "flops", "seconds"}

    def never(_: Topology) -> dict[str, float]:
        raise AssertionError("a finished run scores nothing")

    assert scale(SEED, out=tmp_path, **{**options, "scorer": never}) == steps
    with pytest.raises(
        InputError, match=r"step 0 would have had 13 .* are on record.*max_params is .*8000000.*4000000"
    ):
        scale(SEED, out=tmp_path, **{**options, "max_params": 4e6})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_params": 1e6}, "already has 2,419,976"),
        ({"max_params": 2_500_000}, "smallest first step"),
        ({"max_params": (12e6, 6e6)}, "swap"),
        ({"max_params": -1}, "max_params"),
        ({"max_params": math.nan}, "max_params"),
        ({"max_params": (1e6, 2e6, 3e6)}, "max_params"),
        ({"max_steps": 0}, "max_steps"),
        ({"convention": "other"}, "convention"),
        ({"shrink": 3}, "shrink"),
        ({"seed": -1}, "seed"),
        ({"scorer": lambda t: {"ntk_condition": 1.0}}, "length_distortion"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "nonsense"}, "nonsense"),
    ],
)
def test_bad_input(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        scale(SEED, **{"scorer": measures, "out": tmp_path / "run", **QUIET, **options})
    assert "\n" not in str(caught.value)
