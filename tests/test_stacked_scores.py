"""Networks of one topology scored together, as on a GPU: the same numbers as one by one, in few launches, and passes
that a CUDA graph can hold. On the CPU, which by itself scores them side by side, this is asked for."""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from launch_counter import LaunchCounter
from test_cuda_tracing import fake_runtime, traced  # noqa: F401  (a fixture)
from torch import Tensor

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.backends import FallbackWarning
from asvit_fast.models import AsViT
from asvit_fast.scoring import ScoreSettings, draws, score_repeat, stacked_score, stacked_weights
from asvit_fast.scoring.cuda_graphs import GraphCache, Recorded, capture, copy_into

score_module = importlib.import_module("asvit_fast.scoring.score")
CPU = torch.device("cpu")
SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
TOPOLOGIES = {
    "seed": SEED,
    "deep": "8,2,3,2|4,1,2,1|3,2,2,1|2,1,1,1|8,16",  # an odd neighbourhood, one without overlap
    "padded windows": "5,3,3|2,3,2|3,1,4|4,2,6|8,20",  # maps that windows do not divide, heads that do not divide 20
}
METRICS = ("length_distortion", "curvature", "gauss_length", "ntk_condition")
FAST = {"metrics": METRICS, "img_size": (40, 56), "thetas": 4, "repeats": 3, "batch": 4}


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(score_module, "stacks_networks", lambda device: True)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def values(results: Sequence[dict[str, dict[str, float]]]) -> list[list[float]]:
    return [[result[name]["value"] for name in METRICS] for result in results]


@pytest.mark.parametrize("norms", ["auto", "keep"])
@pytest.mark.parametrize("convention", ["paper", "reference"])
@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_the_same_numbers_as_one_by_one(name: str, convention: str, norms: str, dtype: torch.dtype) -> None:
    settings = ScoreSettings(**FAST, convention=convention, norms=norms, device="cpu")
    topology, networks = af.Topology.parse(TOPOLOGIES[name]), [(2, (0, 7)), (0, (0, 7)), (1, (0, 8))]
    together = values(stacked_score.score_stacked(topology, networks, settings, None, CPU))
    alone = values([score_repeat(topology, repeat, settings, None, seed) for repeat, seed in networks])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=0.0)


@pytest.mark.parametrize("order", [1, 2])
def test_weights_of_any_kind(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases and norms that do something, unlike those of networks as they are drawn."""
    redraw = draws.redraw

    def perturbed(model: AsViT, repeat: int, settings: ScoreSettings, seed: draws.Seed) -> None:
        redraw(model, repeat, settings, seed)
        generator = torch.Generator().manual_seed(repeat)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    monkeypatch.setattr(draws, "redraw", perturbed)
    monkeypatch.setattr(stacked_weights, "redraw", perturbed)
    topology = af.Topology.parse(TOPOLOGIES["padded windows"])
    metrics = ("length_distortion", "ntk_condition") if order == 1 else ("curvature",)
    for norms in ("auto", "keep"):
        settings = ScoreSettings(**{**FAST, "metrics": metrics}, norms=norms, device="cpu")
        weights = stacked_weights.stack_weights(topology, [(0, 0), (1, 0)], settings, pinned=False)
        assert not weights.neutral
        together = stacked_score.score_stacked(topology, [(0, 0), (1, 0)], settings, None, CPU)
        for repeat, result in enumerate(together):
            alone = score_repeat(topology, repeat, settings)
            for metric in metrics:
                assert result[metric]["value"] == pytest.approx(alone[metric]["value"], rel=2e-5)


def test_many_tokens_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to a Gram matrix: a large weight that few tokens meet, and the other way round."""
    from asvit_fast.scoring.stacked_kernels import Grams

    generator = torch.Generator().manual_seed(0)
    for tokens, inputs, outputs in ((3, 40, 30), (50, 4, 3)):
        x, gradient = (torch.randn(2, 5, tokens, n, generator=generator) for n in (inputs, outputs))
        grams = Grams(2, x[0])
        grams.add_product(x, gradient)
        rows = torch.einsum("rbto,rbti->rboi", gradient.double(), x.double()).flatten(2)
        torch.testing.assert_close(grams.total, rows @ rows.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stacked")
def test_networks_are_stacked_by_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come in the order of the networks, those of a timm model among them; many are done in parts."""
    other = TOPOLOGIES["deep"]
    networks = [(SEED, 0, (1, 2)), (other, 0, (1, 2)), ("resnet10t", 0, 1), (SEED, 1, (1, 2)), (SEED, 0, (3, 2))]
    networks += [(other, repeat, (1, 2)) for repeat in range(1, 10)]
    settings = ScoreSettings(**FAST, device="cpu")
    stacks: list[list[tuple[int, draws.Seed]]] = []

    def spy(topology: af.Topology, part: list[tuple[int, draws.Seed]], *rest: object) -> list:
        stacks.append(part)
        return stacked_score.score_stacked(topology, part, *rest)

    monkeypatch.setattr(score_module, "score_stacked", spy)
    together = values(score_module.score_networks(networks, settings, None, CPU))
    assert [len(part) for part in stacks] == [2, 8, 2, 1]
    for ours, (target, repeat, seed) in zip(together, networks, strict=True):
        theirs = values([score_repeat(target, repeat, settings, None, seed)])[0]
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.usefixtures("stacked")
def test_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> list:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")

    monkeypatch.setattr(score_module, "score_stacked", fails)
    with backends.forget_notices(), pytest.warns(FallbackWarning, match="one by one, memory ran out"):
        scored = af.score(SEED, **FAST, device="cpu")
    settings = ScoreSettings(**FAST, device="cpu")
    assert scored["curvature"].values[1] == score_repeat(SEED, 1, settings)["curvature"]["value"]


@pytest.mark.usefixtures("stacked")
def test_a_search_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"img_size": 32, "thetas": 3, "repeats": 2, "batch": 3, "width": 8, "device": "cpu", "progress": False}
    together = af.search(steps=3, **options)
    monkeypatch.setattr(score_module, "stacks_networks", lambda device: False)
    alone = af.search(steps=3, **options)
    assert together.topology == alone.topology
    for ours, theirs in zip(together.trace, alone.trace, strict=True):
        assert ours["topology"] == theirs["topology"]
        assert ours["ntk_condition"] == pytest.approx(theirs["ntk_condition"], rel=1e-5)


def test_one_copy_of_all_weights() -> None:
    settings = ScoreSettings(**FAST, device="cpu")
    weights = stacked_weights.stack_weights(af.Topology.parse(SEED), [(0, 0), (1, 0)], settings, pinned=False)
    model = draws.draw(af.Topology.parse(SEED), 1, settings, 0)
    for name, parameter in model.named_parameters():
        if name.startswith(("norm.", "head.")):
            assert name not in weights.places
            continue
        of_network = weights[name][1]
        assert of_network.untyped_storage().data_ptr() == weights.flat.untyped_storage().data_ptr()
        assert torch.equal(of_network.flatten().sort().values, parameter.detach().flatten().sort().values)
        offset, _ = weights.places[name]
        assert offset * weights.flat.element_size() % 256 == 0
    biases = {name for name in weights.places if name.endswith(".bias")}
    assert biases - weights.neutral == {"patch_embed.proj.bias"}


def test_weights_do_not_depend_on_threads(two_threads: None) -> None:
    settings, topology = ScoreSettings(**FAST, device="cpu", convention="reference"), af.Topology.parse(SEED)
    members = [(repeat, (3, 1)) for repeat in range(5)]
    several = stacked_weights.stack_weights(topology, members, settings, pinned=False)
    torch.set_num_threads(1)
    one = stacked_weights.stack_weights(topology, members, settings, pinned=False)
    assert torch.equal(several.flat, one.flat) and several.places == one.places


# ------------------------------------------------------------------ launches


@pytest.mark.slow
def test_launches(fake_runtime) -> None:  # noqa: F811
    """Five networks of the seed topology at 224 pixels; nothing that a graph holds waits, or comes from elsewhere."""
    counts = traced(fake_runtime, "score_launches_program.py", SEED)
    curve, both, ntk = "length_distortion", "length_distortion+curvature", "ntk_condition"
    for name in (curve, both):
        assert counts[f"{name}, stacked"]["launches"] <= 60 < counts[f"{name}, one by one"]["launches"] / 6
    assert counts[f"{ntk}, stacked"]["launches"] <= 300 < counts[f"{ntk}, one by one"]["launches"] / 15
    for name in (curve, both, ntk):
        assert counts[f"{name}, stacked"]["syncs"] == 1  # the result
        assert counts[f"{name}, captured"]["syncs"] == counts[f"{name}, captured"]["transfers"] == 0


def test_the_number_of_networks_does_not_count() -> None:
    settings, topology, launches = ScoreSettings(**FAST, device="cpu"), af.Topology.parse(SEED), set()
    images = torch.randn(4, *settings.image_shape)
    for networks in (2, 7):
        members = [(repeat, 0) for repeat in range(networks)]
        weights = stacked_weights.stack_weights(topology, members, settings, pinned=False)
        with LaunchCounter() as counter:
            stacked_score._grams(topology, weights, settings, images, 0, CPU)
        launches.add(counter.totals()["launches"])
    assert len(launches) == 1


# ------------------------------------------------------------------ graphs


class Recorder:
    """In place of CUDA graphs: runs the pass again on its buffers, and counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.captured = self.replayed = 0
        self.error = error

    def __call__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], stream: object, pool: object
    ) -> Recorded:
        if self.error is not None:
            raise self.error
        self.captured += 1
        static = [torch.empty_like(x) for x in inputs]
        copy_into(static, inputs)
        output = function(*static)

        def replay() -> None:
            self.replayed += 1
            output.copy_(function(*static))

        return Recorded(static, output, replay)


def twice(x: Tensor) -> Tensor:
    return 2 * x


def test_the_second_pass_is_captured() -> None:
    recorder = Recorder()
    graphs = GraphCache(recorder, most=2)
    for number in range(4):
        x = torch.full((3,), float(number))
        result = graphs.run("a test", "key", twice, [x], CPU)
        assert result.tolist() == [2 * number] * 3
        result.fill_(-1.0)  # it is the caller's
        assert (recorder.captured, recorder.replayed) == (min(number, 1), number)
    with backends.use_backend("reference"):
        graphs.run("a test", "key", twice, [x], CPU)  # another backend, other kernels
    graphs.run("a test", "key", twice, [torch.ones(4)], CPU)  # another shape
    graphs.run("a test", "key", twice, [x.double()], CPU)
    graphs.run("a test", "other", twice, [x], CPU)
    assert recorder.captured == 1


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    graphs = GraphCache(recorder, most=2)

    def run(*keys: str) -> None:
        for key in keys:
            graphs.run("a test", key, twice, [torch.ones(1000)], CPU)

    run("a", "a", "b", "b", "a", "c", "c")
    assert [key[1] for key in graphs.graphs] == ["a", "c"]  # b is the one not used for longest
    run("b")
    assert [key[1] for key in graphs.graphs] == ["c", "b"] and recorder.captured == 4
    monkeypatch.setattr("asvit_fast.scoring.cuda_graphs._memory", lambda device: 16 * 8000.0)  # of one graph
    run("d", "d")
    assert [key[1] for key in graphs.graphs] == ["d"]
    graphs.clear()
    assert not graphs.graphs
    run("d")
    assert [key[1] for key in graphs.graphs] == ["d"]


def test_a_capture_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = GraphCache(Recorder(RuntimeError("operation not permitted when stream is capturing\nmore")))
    ones = torch.ones(3)
    graphs.run("a test", "key", twice, [ones], CPU)
    with backends.forget_notices():
        with pytest.warns(
            FallbackWarning, match="a test is launched kernel by kernel.*not permitted when stream is capturing$"
        ):
            assert graphs.run("a test", "key", twice, [ones], CPU).tolist() == [2.0] * 3
        assert graphs.run("a test", "key", twice, [ones], CPU).tolist() == [2.0] * 3  # without a word
    monkeypatch.setenv("ASVIT_FAST_STRICT", "1")
    graphs = GraphCache(graphs.capture)
    graphs.run("a test", "key", twice, [ones], CPU)
    with pytest.raises(FallbackWarning):
        graphs.run("a test", "key", twice, [ones], CPU)


def test_memory_for_a_graph_runs_out() -> None:
    """Others make room for the pass itself; the next one may find memory again."""
    recorder = Recorder()
    graphs = GraphCache(recorder)
    ones = torch.ones(3)
    for key in ("a", "a", "b"):
        graphs.run("a test", key, twice, [ones], CPU)
    recorder.error = torch.OutOfMemoryError("CUDA out of memory")
    assert graphs.run("a test", "b", twice, [ones], CPU).tolist() == [2.0] * 3
    assert not graphs.graphs
    recorder.error = None
    graphs.run("a test", "b", twice, [ones], CPU)
    assert len(graphs.graphs) == 1


class FakeStream:
    device = torch.device("cpu", 0)

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: FakeStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("error", [None, RuntimeError("not permitted")], ids=["works", "fails"])
def test_the_steps_of_a_capture(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's functions, in their order: here they only say that they were called."""
    calls: list[str] = []
    caller, side = FakeStream("caller", calls), FakeStream("side", calls)

    class FakeGraph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            calls.append(f"begin in {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            calls.append("end")

        def replay(self) -> None:
            calls.append("replay")

        def pool(self) -> str:
            return "pool of the graph"

    class FakeGenerator:
        def clone_state(self) -> str:
            return "before"

        def graphsafe_set_state(self, state: str) -> None:
            calls.append(f"random numbers of {state}")

    @contextlib.contextmanager
    def stream(one: FakeStream) -> Iterator[None]:
        calls.append(f"on {one.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "default_generators", (FakeGenerator(),))

    def run(x: Tensor) -> Tensor:
        calls.append("run")
        if error is not None and calls.count("run") == 2:
            raise error
        return 2 * x

    inputs, before = [torch.ones(3)], "side waits for caller, on side, run, on side"
    captured = f"{before}, begin in pool, thread_local, run, end"
    if error is not None:
        with pytest.raises(RuntimeError, match="not permitted"):
            capture(run, inputs, side, "pool")
        assert ", ".join(calls) == f"{captured}, random numbers of before"
        return
    recorded = capture(run, inputs, side, "pool")
    recorded.replay()
    assert ", ".join(calls) == f"{captured}, caller waits for side, replay"
    assert recorded.pool == "pool of the graph" and recorded.output.tolist() == [2.0] * 3
    assert recorded.inputs[0] is not inputs[0] and torch.equal(recorded.inputs[0], inputs[0])


def test_an_error_of_the_pass_itself() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("of the pass")

    with pytest.raises(ValueError, match="of the pass"):
        GraphCache(Recorder()).run("a test", "key", broken, [torch.ones(3)], CPU)


def test_threads_take_turns() -> None:
    """Buffers are used by one at a time."""
    graphs, wrong = GraphCache(Recorder()), []

    def slowly(x: Tensor) -> Tensor:
        time.sleep(1e-3)
        return 2 * x

    for _ in range(2):
        graphs.run("a test", "key", slowly, [torch.ones(3)], CPU)

    def work(number: int) -> None:
        for _ in range(10):
            result = graphs.run("a test", "key", slowly, [torch.full((3,), float(number))], CPU)
            if not (result == 2 * number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.usefixtures("stacked")
def test_scores_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed with the weights, circles and images of the moment: what is not an input would show here."""
    recorder, settings = Recorder(), ScoreSettings(**{**FAST, "repeats": 2}, device="cpu")
    monkeypatch.setattr(stacked_score, "GRAPHS", GraphCache(recorder))
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        images = torch.randn(4, 3, 40, 56, generator=generator) if step % 2 else None
        networks = [(SEED, repeat, (step, 1)) for repeat in range(2)]
        ours = values(score_module.score_networks(networks, settings, images, CPU))
        alone = [score_repeat(SEED, repeat, settings, images, seed) for _, repeat, seed in networks]
        for mine, theirs in zip(ours, values(alone), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    assert (recorder.captured, recorder.replayed) == (2, 6)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_any_mode_of_autograd(mode: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked_score, "GRAPHS", GraphCache(Recorder()))
    stacked_score._circles.cache_clear()
    stacked_score._noise.cache_clear()
    expected = af.score(SEED, **FAST, device="cpu")
    with mode():
        scored = af.score(SEED, **FAST, device="cpu")
    again = af.score(SEED, **FAST, device="cpu")
    for name in METRICS:
        assert scored[name].values == expected[name].values == again[name].values
        assert all(map(math.isfinite, scored[name].values))
