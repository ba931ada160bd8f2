import json
import math
import random
from pathlib import Path

import pytest

from asvit_fast.errors import InputError
from asvit_fast.search import RewardHistory, reward_sequence

GOLDEN = json.loads((Path(__file__).parent / "data" / "search.json").read_text())["rewards"]
CONVENTIONS = ["paper", "reference"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"history-{case['buffer_size']}")
def test_golden_rewards(case: dict) -> None:
    rewards = reward_sequence(case["exp"], case["ntk"], convention="reference", history=case["buffer_size"])
    assert rewards == pytest.approx(case["reward"], rel=1e-12, abs=1e-12)


def test_paper_takes_the_range_of_everything_so_far() -> None:
    length, ntk = [1.0, 3.0, 2.0, 2.0], [10.0, 10.0, 30.0, 20.0]
    rewards = reward_sequence(length, ntk, convention="paper")
    assert rewards == [0.0, 2 / 2, (2 - 3) / 2 - (30 - 10) / 20, 0 - (20 - 30) / 20]


def test_no_range_is_no_change() -> None:
    assert reward_sequence([2.0] * 4, [5.0] * 4, convention="paper") == [0.0] * 4
    assert reward_sequence([2.0] * 4, [5.0] * 4, convention="reference") == [0.0] * 4


def test_short_history_forgets() -> None:
    length, ntk = [0.0, 100.0, 1.0, 2.0, 3.0], [1.0] * 5
    assert reward_sequence(length, ntk, history=2)[-1] == pytest.approx(1 / (1 + 1e-6))
    assert reward_sequence(length, ntk, history=20)[-1] == pytest.approx(1 / (100 + 1e-6))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", ["length", "ntk"])
def test_a_non_finite_candidate_never_beats_a_finite_one(convention: str, bad: float, which: str) -> None:
    generator = random.Random(0)
    for _ in range(200):
        count = generator.randint(1, 30)
        past = [(generator.uniform(1, 5), math.exp(generator.gauss(1, 2))) for _ in range(count)]
        past = [(bad, n) if which == "length" and generator.random() < 0.3 else (v, n) for v, n in past]
        past = [(v, bad) if which == "ntk" and generator.random() < 0.3 else (v, n) for v, n in past]
        other = generator.uniform(1, 5)

        def reward_of(value: float, past: list = past, other: float = other) -> float:
            pair = (value, other) if which == "length" else (other, value)
            return reward_sequence(*zip(*past, pair, strict=True), convention=convention, history=5)[-1]

        seen = [pair[which == "ntk"] for pair in past if math.isfinite(pair[which == "ntk"])]
        assert math.isfinite(reward_of(bad))
        assert all(reward_of(bad) <= reward_of(value) + 1e-12 for value in seen)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_everything_stays_finite(convention: str) -> None:
    nan, inf = math.nan, math.inf
    length = [nan, nan, 1.0, inf, 2.0, -inf, 3.0, nan]
    ntk = [inf, inf, inf, 5.0, inf, 4.0, nan, 9.0]
    rewards = reward_sequence(length, ntk, convention=convention, history=3)
    assert all(map(math.isfinite, rewards))
    assert rewards[:2] == [0.0, 0.0]


def test_a_bad_candidate_moves_along_with_the_worst() -> None:
    # The bad one counts as 10 when it comes, as 40 once that is known: leaving it for 40 is then no change at all.
    assert reward_sequence([1.0] * 4, [5.0, 10.0, math.inf, 40.0], convention="paper")[2:] == [0.0, 0.0]


def test_incremental_and_state() -> None:
    case = GOLDEN[0]
    whole = RewardHistory("paper")
    rewards = [whole.add(*pair) for pair in zip(case["exp"], case["ntk"], strict=True)]
    assert rewards == reward_sequence(case["exp"], case["ntk"], "paper")
    half = RewardHistory("paper")
    half.length, half.ntk = case["exp"][:20], case["ntk"][:20]
    assert [half.add(*pair) for pair in zip(case["exp"][20:], case["ntk"][20:], strict=True)] == rewards[20:]


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="3 length distortions but 2"):
        reward_sequence([1, 2, 3], [1, 2])
    with pytest.raises(InputError, match="'papers'"):
        reward_sequence([1], [1], convention="papers")
    with pytest.raises(InputError, match="history"):
        reward_sequence([1], [1], history=1)
