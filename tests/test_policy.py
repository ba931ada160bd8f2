import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from asvit_fast.errors import InputError
from asvit_fast.search import Policy
from asvit_fast.topology import SearchSpace

GOLDEN = json.loads((Path(__file__).parent / "data" / "search.json").read_text())["policy"]


def test_golden_steps() -> None:
    policy = Policy(SearchSpace(), logits=GOLDEN["initial_logits"])
    for step in GOLDEN["steps"]:
        assert policy.log_prob(step["action"]) == pytest.approx(step["log_prob"], rel=1e-12)
        assert policy.entropy() == pytest.approx(step["entropy"], rel=1e-12)
        policy.update(step["action"], step["reward"])
        assert policy.baseline == pytest.approx(step["baseline"], rel=1e-12, abs=1e-15)
        expected = torch.tensor(step["logits"], dtype=torch.float64)
        torch.testing.assert_close(policy.logits.detach(), expected, rtol=1e-12, atol=1e-14)
    assert policy.best().seed_string == GOLDEN["derived"]


def test_entropy_starts_at_that_of_the_space() -> None:
    policy = Policy(SearchSpace(), generator=torch.Generator().manual_seed(0))
    assert policy.entropy() == pytest.approx(math.log(4_556_250), abs=1e-4)
    assert policy.entropy() == pytest.approx(15.33, abs=5e-3)


def test_logits_per_dimension_equal_flat_ones() -> None:
    space = SearchSpace()
    flat = torch.arange(45.0, dtype=torch.float64) / 45
    parts = [part.tolist() for part in flat.split([len(c) for c in space.dimensions.values()])]
    for logits in (flat, flat.tolist(), parts):
        assert torch.equal(Policy(space, logits).logits.detach(), flat)


@pytest.mark.parametrize("logits", [[0.0] * 44, [[0.0] * 5] * 12, [float("nan")] * 45, []])
def test_bad_logits(logits: list) -> None:
    with pytest.raises(InputError, match="logits"):
        Policy(SearchSpace(), logits)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError):
        Policy(SearchSpace(), **options)


def test_bad_actions_and_rewards() -> None:
    policy = Policy(SearchSpace())
    for action in ([0] * 11, [9] + [0] * 11, [-1] + [0] * 11):
        with pytest.raises(InputError):
            policy.update(action, 1.0)
    for reward in (math.inf, math.nan):
        with pytest.raises(InputError, match="reward"):
            policy.update([0] * 12, reward)


def test_samples_follow_the_probabilities() -> None:
    space = SearchSpace().narrow(K1=(4, 5, 6), S3=(1, 2))
    logits = torch.randn(sum(len(c) for c in space.dimensions.values()), generator=torch.Generator().manual_seed(3))
    policy = Policy(space, 2 * logits)
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([policy.sample(generator) for _ in range(4000)])  # [draws, dimensions]
    for column, part in zip(draws.T, policy.logits.detach().split(policy._sizes), strict=True):
        frequencies = torch.bincount(column, minlength=len(part)) / len(column)
        torch.testing.assert_close(frequencies.double(), part.softmax(0), rtol=0, atol=0.04)


def test_reinforcing_one_action_makes_it_the_best() -> None:
    policy = Policy(SearchSpace(), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    target = [4, 2, 2, 2, 0, 0, 0, 1, 0, 2, 4, 1]
    for _ in range(600):
        action = policy.sample(generator)
        policy.update(action, float(sum(a == t for a, t in zip(action, target, strict=True))))
    assert policy.best() == policy.space.topology(target)
    assert policy.entropy() < 6


def test_ranked_is_the_whole_space_by_probability() -> None:
    space = SearchSpace().narrow(K2=(4,), K3=(2,), K4=(2,), E2=(3,), E3=(3,), E4=(2,), S3=(1,), K1=(4, 8), E1=(2, 3))
    size = sum(len(choices) for choices in space.dimensions.values())
    policy = Policy(space, torch.randn(size, generator=torch.Generator().manual_seed(5)))
    ranked = list(policy.ranked())
    everything = itertools.product(*(range(len(choices)) for choices in space.dimensions.values()))
    assert sorted(map(tuple, ranked)) == sorted(everything)
    log_probs = [policy.log_prob(action) for action in ranked]
    assert all(first >= second - 1e-12 for first, second in itertools.pairwise(log_probs))
    assert space.topology(ranked[0]) == policy.best()


def test_state_continues_bit_for_bit() -> None:
    steps = GOLDEN["steps"]
    whole, first = (Policy(SearchSpace(), GOLDEN["initial_logits"]) for _ in range(2))
    for step in steps[:6]:
        whole.update(step["action"], step["reward"])
        first.update(step["action"], step["reward"])
    second = Policy(SearchSpace(), generator=torch.Generator().manual_seed(9))
    second.load_state_dict(first.state_dict())
    for step in steps[6:]:
        whole.update(step["action"], step["reward"])
        second.update(step["action"], step["reward"])
    assert torch.equal(whole.logits, second.logits)
    assert whole.baseline == second.baseline
