"""Scores on a GPU: of networks together, and replayed. What holds on any device is checked on the CPU as well."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import pytest
import torch

import asvit_fast as af
from asvit_fast.cuda_capture import capturing
from asvit_fast.scoring import ScoreSettings, score_repeat, stacked_score
from asvit_fast.scoring.cuda_graphs import GraphCache

score_module = importlib.import_module("asvit_fast.scoring.score")
METRICS = ("length_distortion", "curvature", "ntk_condition")
FAST = {"metrics": METRICS, "img_size": 64, "thetas": 4, "repeats": 3, "batch": 4}
SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
OTHERS = ["5,3,3|2,3,2|3,1,4|4,2,6|8,20", "8,2,3,2|4,1,2,1|3,2,2,1|2,1,1,1|8,16", "4,8,2|2,4,2|2,2,3|2,1,4|16,32"]
KINDS = {"the NTK", "the curve"}


def topologies(count: int) -> list[str]:
    """Different ones of Table 1's space."""
    kernels, expansions = (4, 5, 6, 7, 8), (2, 3, 4, 5)
    every = [f"{k},2,{e}|4,1,2|4,1,4|4,1,6|16" for k in kernels for e in expansions]
    return every[:count]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GraphCache]:
    """Of this test alone; networks are run together on the CPU, too."""
    cache = GraphCache()
    monkeypatch.setattr(stacked_score, "GRAPHS", cache)
    monkeypatch.setattr(score_module, "GRAPHS", cache)
    monkeypatch.setattr(score_module, "stacks_networks", lambda device: True)
    yield cache
    cache.clear()


def without_graphs(cache: GraphCache) -> None:
    """From now on every pass is launched kernel by kernel."""
    cache.clear()
    cache.failed |= KINDS


@pytest.mark.parametrize("topology", [SEED, *OTHERS])
def test_replays_are_what_they_replay(device: torch.device, graphs: GraphCache, topology: str) -> None:
    """Three passes of other weights, circles and images each: one eager, one captured and replayed, one replayed."""
    scores = [af.score(topology, **FAST, seed=seed, device=device) for seed in range(3)]
    assert len(graphs.graphs) == (2 if device.type == "cuda" else 0) and not graphs.failed
    without_graphs(graphs)
    for seed, replayed in enumerate(scores):
        eager = af.score(topology, **FAST, seed=seed, device=device)
        for name in METRICS:
            assert replayed[name].values == pytest.approx(eager[name].values, rel=1e-5)


@pytest.mark.parametrize("norms", ["auto", "keep"])
@pytest.mark.parametrize("topology", [SEED, *OTHERS])
def test_together_as_one_by_one_on_a_cpu(device: torch.device, topology: str, norms: str) -> None:
    settings = ScoreSettings(**FAST, norms=norms, device="cpu")
    ours = af.score(topology, **FAST, norms=norms, device=device)
    for repeat in range(FAST["repeats"]):
        theirs = score_repeat(topology, repeat, settings)
        for name in METRICS:
            assert ours[name].values[repeat] == pytest.approx(theirs[name]["value"], rel=1e-3)


def test_a_search_is_the_same_without_graphs(device: torch.device, graphs: GraphCache) -> None:
    """Of one topology after a few steps: passes come again."""
    space = af.SearchSpace()
    options = {"img_size": 64, "thetas": 4, "repeats": 2, "batch": 4, "device": device, "progress": False}
    with_graphs = af.search(space, steps=5, **options)
    again = af.search(space, steps=5, **options)  # all of it captured
    assert not graphs.failed and bool(graphs.graphs) == (device.type == "cuda")
    without_graphs(graphs)
    without = af.search(space, steps=5, **options)
    assert str(with_graphs.topology) == str(again.topology) == str(without.topology)
    for first, second, third in zip(with_graphs.trace, again.trace, without.trace, strict=True):
        assert first["topology"] == second["topology"] == third["topology"]
        for name in ("length_distortion", "ntk_condition"):
            assert first[name] == pytest.approx(third[name], rel=1e-5)
            assert second[name] == pytest.approx(third[name], rel=1e-5)


@pytest.mark.gpu
def test_memory_does_not_grow(graphs: GraphCache) -> None:
    """20 topologies, each captured: few graphs stay, and what they hold is given back."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    af.score(SEED, **FAST, device="cuda")  # libraries' workspaces, circles and images
    before = torch.cuda.memory_allocated()
    reserved = []
    for _ in range(3):
        for topology in topologies(20):
            for _ in range(2):
                af.score(topology, **FAST, device="cuda")
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert len(graphs.graphs) <= graphs.most
    assert not graphs.failed
    assert reserved[2] <= 1.1 * reserved[0] + 2**26
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**28  # workspaces of the stream that captures


@pytest.mark.gpu
def test_on_a_stream_of_the_callers(graphs: GraphCache) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    expected = af.score(SEED, **FAST, device="cuda")
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream):
            scored = af.score(SEED, **FAST, device="cuda")
        for name in METRICS:
            assert scored[name].values == pytest.approx(expected[name].values, rel=1e-5)
    assert len(graphs.graphs) == 2 and not graphs.failed


@pytest.mark.gpu
def test_random_numbers_after_a_capture_that_fails() -> None:
    """They go on as if nothing had been tried, and the next capture succeeds."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    torch.cuda.manual_seed(3)
    x, expected = torch.ones(4, device="cuda"), [torch.rand(5, device="cuda") for _ in range(2)]
    torch.cuda.manual_seed(3)
    found, stream = [torch.rand(5, device="cuda")], torch.cuda.Stream()
    with pytest.raises(RuntimeError), capturing(torch.cuda.CUDAGraph(), stream):
        x.sum().item()
    found.append(torch.rand(5, device="cuda"))
    assert all(map(torch.equal, found, expected))
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        y = x + torch.rand(4, device="cuda")
    graph.replay()
    assert (y >= 1).all() and y.unique().numel() == 4
