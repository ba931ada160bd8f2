"""Scores where memory or threads are few: work in parts and side by side, with the same numbers."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import asvit_fast as af
from asvit_fast.scoring import ScoreSettings, circle, score_repeat, theta_grid
from asvit_fast.scoring.memory import split_on_oom
from asvit_fast.scoring.parallel import map_in_threads
from asvit_fast.scoring.score import score_networks

SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
FAST = {"img_size": 32, "thetas": 4, "repeats": 2, "batch": 4}


def test_work_splits_when_memory_runs_out() -> None:
    sizes = []

    def run(part: slice) -> list[int]:
        count = part.stop - part.start
        sizes.append(count)
        if count > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
        return list(range(part.start, part.stop))

    with pytest.warns(UserWarning, match="memory ran out"):
        pieces = split_on_oom(run, 10, "a test")
    assert [i for piece in pieces for i in piece] == list(range(10)) and sizes[:2] == [10, 5]
    with pytest.raises(RuntimeError, match="something else"):
        split_on_oom(lambda part: (_ for _ in ()).throw(RuntimeError("something else")), 4, "a test")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept() -> None:
    program = """
import resource, sys, threading, torch
from asvit_fast.malloc import tune_allocator
assert sys.argv[1] == "no" or tune_allocator()
def work():
    for _ in range(3):
        blocks = [torch.ones(6_000_000) for _ in range(8)]  # 24 MB each
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=work)
    thread.start(); thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([page_faults() for _ in range(4)][-1])
"""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", program, arg], capture_output=True, text=True, check=True).stdout)
        for arg in ("yes", "no")
    )
    assert kept < 0.1 * returned


def test_a_split_curve_and_ntk_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = af.create_model(SEED, img_size=32, num_classes=0, dtype=torch.float64).eval()
    u0, u1 = circle((3, 32, 32), torch.Generator().manual_seed(0))
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    whole, gram = af.curve(model.score_features, theta_grid(5), u0, u1), af.ntk_gram(model, images)
    original = model.score_features

    def limited(x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return original(x)

    monkeypatch.setattr(model, "score_features", limited)
    with pytest.warns(UserWarning, match="memory ran out"):
        split = af.curve(model.score_features, theta_grid(5), u0, u1)
    with pytest.warns(UserWarning, match="memory ran out"):
        split_gram = af.ntk_gram(model, images)
    torch.testing.assert_close(split_gram, gram, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(split.acceleration, whole.acceleration, rtol=1e-10, atol=1e-14)


def test_work_side_by_side() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = map_in_threads(lambda i: (i, torch.get_num_threads()), range(5), cpu)
        assert seen == [(i, 1) for i in range(5)]  # in order, each with its share of the threads
        assert torch.get_num_threads() == 2
        with pytest.raises(af.InputError, match="task 3"):
            map_in_threads(_fail_at_three, range(5), cpu)
        assert map_in_threads(str, [7], cpu) == ["7"]
        assert map_in_threads(str, [], cpu) == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("networks", [0, 1, 2, 3])
@pytest.mark.parametrize("metrics", [("ntk_condition", "curvature", "length_distortion"), ("length_distortion",)])
def test_networks_side_by_side(networks: int, metrics: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit what one network after the other gives, and the last one in parts when a worker would be idle."""
    settings, cpu, threads = ScoreSettings(**FAST, metrics=metrics), torch.device("cpu"), torch.get_num_threads()
    targets = [(SEED, repeat, (1, repeat)) for repeat in range(networks)]
    torch.set_num_threads(1)
    alone = [score_repeat(target, repeat, settings, None, seed) for target, repeat, seed in targets]
    asked: list[tuple[str, ...]] = []

    def spy(target: str, repeat: int, settings: ScoreSettings, *rest: object) -> dict:
        asked.append(settings.metrics)
        return score_repeat(target, repeat, settings, *rest)

    monkeypatch.setitem(score_networks.__globals__, "score_repeat", spy)
    torch.set_num_threads(2)
    try:
        results = score_networks(targets, settings, None, cpu)
    finally:
        torch.set_num_threads(threads)
    values = [[{name: r["value"] for name, r in result.items()} for result in each] for each in (alone, results)]
    split = len(metrics) > 1 and networks % 2 == 1
    assert values[0] == values[1]
    assert len(asked) == networks + split


def _fail_at_three(i: int) -> int:
    if i == 3:
        raise af.InputError("task 3 cannot be done")
    return i
