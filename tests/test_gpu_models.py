"""Whole networks on a GPU: every family of ``accelerate``, torch.compile, graphs, scores, a search, exports.

With ASVIT_FAST_REHEARSE=1 those that take the fixture ``gpu`` run on the CPU.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import test_accelerate_families as families
import test_export_formats
import timm
import torch
from family_checks import Model, fast_classes, prepared, sample
from tiny_swin import images, swin
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export.passes import move_to_device_pass

import asvit_fast as af
from asvit_fast.bench import timer
from asvit_fast.bench.providers import relative_distance, tolerance
from asvit_fast.export import export

pytestmark = pytest.mark.gpu
TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"

# --------------------------------------------------------------------------- accelerate


def all_families() -> dict[str, Model]:
    """Of timm and torchvision, and of the libraries that are installed."""
    found = {
        name: (make, tuple(families.image(size).shape), kinds) for name, (make, size, kinds) in families.MODELS.items()
    }
    if importlib.util.find_spec("transformers") is not None:
        from test_accelerate_transformers import MODELS

        found |= {f"transformers {name}": model for name, model in MODELS.items()}
    if importlib.util.find_spec("monai") is not None:
        from test_accelerate_monai import MODELS

        found |= {f"monai {name}": model for name, model in MODELS.items()}
    return found


FAMILIES = all_families()


FLOAT32_ALONE = {"transformers maskformer"}  # its own masks are float32, whatever the network is


def of_cpu_alone(name: str) -> bool:
    """Products of packed weights, sums in them and MLPs in parts, which a GPU gains nothing by."""
    return name in ("FastLinear", "FastBlock") or "mlp" in name.lower()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
        for name in FAMILIES
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32 or name not in FLOAT32_ALONE
    ],
)
def test_accelerated_family(name: str, dtype: torch.dtype, gpu: torch.device, repeatable_float32: None) -> None:
    """Outputs and all gradients, in evaluation and training."""
    make, shape, expected = FAMILIES[name]
    model = prepared(make).to(gpu, dtype)
    af.accelerate(model, strict=True)
    assert {kind for kind in expected if not of_cpu_alone(kind)} <= fast_classes(model)
    x = sample(shape, dtype).to(gpu)
    result = af.verify(model, x, rows=0)
    if not result.ok:  # for an image that is badly conditioned, torch's own operations in another order are no closer
        others = [af.verify(model, x.flip(axis), rows=0) for axis in (x.dim() - 2, x.dim() - 1)]
        assert all(other.ok for other in others), result.table()


# --------------------------------------------------------------------------- torch.compile, graphs


def as_vit() -> nn.Module:
    torch.manual_seed(0)
    return af.create_model(TOPOLOGY, img_size=44, num_classes=3, pos_embed="absolute")


def accelerated_swin(gpu: torch.device) -> nn.Module:
    model = swin().to(gpu)
    assert af.accelerate(model).swapped
    return model


NETWORKS: dict[str, Callable[[torch.device], nn.Module]] = {
    "as-vit": lambda gpu: as_vit().to(gpu),
    "swin": accelerated_swin,
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def step(network: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of all parameters, under autocast where the dtype asks for it."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        output = network(x)
    output.float().square().mean().backward()
    found = [output.detach().clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


@every_network
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_compiled(name: str, mode: str, dtype: torch.dtype, gpu: torch.device, repeatable_float32: None) -> None:
    """Three steps, the second and third of which may be replays; then inference. Nothing is kept out of the graphs."""
    torch.compiler.reset()
    counters.clear()
    model = NETWORKS[name](gpu)
    x = images().to(gpu)
    expected = step(model, model, x, dtype)
    with torch.no_grad(), torch.autocast(gpu.type, dtype, enabled=dtype != torch.float32):
        inferred = copy.deepcopy(model).eval()(x)
    options = {"mode": mode} if gpu.type == "cuda" else {"backend": "aot_eager"}  # the rehearsal is to be short
    network = torch.compile(model, fullgraph=True, dynamic=False, **options)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_distance(step(network, model, x, dtype), expected) < tolerance(dtype, gpu)
    model.eval()
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), torch.autocast(gpu.type, dtype, enabled=dtype != torch.float32):
            found = network(x).clone()
        assert relative_distance([found], [inferred]) < tolerance(dtype, gpu)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.compiler.reset()


@every_network
def test_network_in_a_graph(name: str) -> None:
    """Inference and a step of training, captured by hand, on images that come later."""
    gpu = torch.device("cuda")
    model = NETWORKS[name](gpu)
    static, later = images().to(gpu), images().flip(3).to(gpu)
    with torch.no_grad():
        expected = [model(later)]
    expected += step(model, model, later, torch.bfloat16)
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            output = model(static)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            trained = model(static)
        gradients = torch.autograd.grad(trained.float().square().mean(), list(model.parameters()))
        found[:] = [output, trained.detach(), *gradients]

    graph = timer.captured(call, gpu)
    static.copy_(later)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert relative_distance(found[:1], expected[:1]) < 1e-3
    assert relative_distance(found[1:], expected[1:]) < 1e-2


# --------------------------------------------------------------------------- scores and searches


def test_scores_are_those_of_a_cpu(gpu: torch.device, repeatable_float32: None) -> None:
    """The same networks and images; float32 on both. The condition number is what rounding changes most."""
    metrics = ("length_distortion", "curvature", "gauss_length", "ntk_condition")
    topology = partial(af.score, "4,2,2|2,1,2|3,1,2|2,1,2|16", metrics, img_size=64, thetas=5, repeats=2, batch=4)
    foreign = partial(af.score, swin(), metrics, img_size=44, thetas=3, repeats=1, batch=2)
    for run in (topology, foreign):
        found, expected = run(seed=3, device=gpu), run(seed=3, device="cpu")
        for name in metrics:
            assert found[name].mean == pytest.approx(expected[name].mean, rel=2e-2 if "ntk" in name else 1e-3), name


def test_search_is_that_of_a_cpu(gpu: torch.device, tmp_path: Path, repeatable_float32: None) -> None:
    """The same topologies and scores, as far as rounding lets rewards be the same; it goes on where it was."""
    options = {"img_size": 32, "repeats": 2, "thetas": 3, "batch": 3, "seed": 1, "progress": False}
    found, expected = (af.search(steps=4, device=device, **options) for device in (gpu, "cpu"))
    for ours, theirs in zip(found.trace, expected.trace, strict=True):
        assert ours["topology"] == theirs["topology"]
        assert ours["length_distortion"] == pytest.approx(theirs["length_distortion"], rel=1e-3)
        assert ours["ntk_condition"] == pytest.approx(theirs["ntk_condition"], rel=2e-2)
    assert str(found.topology) == str(expected.topology)
    af.search(steps=2, device=gpu, out=tmp_path, **options)
    resumed = af.search(steps=4, device=gpu, out=tmp_path, **options)
    assert [row["topology"] for row in resumed.trace] == [row["topology"] for row in found.trace]
    assert torch.equal(resumed.policy.logits, found.policy.logits)


# --------------------------------------------------------------------------- export


@every_network
def test_exported_where_it_is(name: str, gpu: torch.device, repeatable_float32: None) -> None:
    """torch.export of a network on the GPU holds our ops, and runs there for any batch."""
    model = NETWORKS[name](gpu).eval()
    x = images(3).to(gpu)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert any("asvit_fast" in str(node.target) for node in program.graph.nodes)
    for batch in (2, 5):
        x = images(batch).to(gpu)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-4)


def test_exported_folder(gpu: torch.device, tmp_path: Path, repeatable_float32: None) -> None:
    """Written from a checkpoint, opened on the GPU: the numbers of the CPU, with our ops and with torch's alone."""
    path, model = test_export_formats.trained(tmp_path / "trained.pth.tar")
    x = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    folder = export(path, tmp_path / "timm")
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).to(gpu).eval()
    program = torch.export.load(export(path, tmp_path / "program", format="exported") / "model.pt2")
    moved = move_to_device_pass(program, gpu) if gpu.type == "cuda" else program
    with torch.no_grad():
        expected = model(x)
        for network in (opened, moved.module()):
            torch.testing.assert_close(network(x.to(gpu)).cpu(), expected, rtol=1e-3, atol=1e-4)
