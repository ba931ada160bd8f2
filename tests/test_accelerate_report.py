"""The report of ``accelerate``: short, grouped, and true on this machine; modules in unusual states."""

from __future__ import annotations

import functools
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from tiny_swin import block, classes, close, images, is_fast, needs_kernels, swin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import asvit_fast as af
from asvit_fast import _extension, backends
from asvit_fast.acceleration.report import OpRun, Report
from asvit_fast.ops.packed_linear import ONEDNN, library

pytestmark = needs_kernels
WHY = "built without compiled kernels: no C++ compiler; build them with `pip install --no-build-isolation .`"


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_notified", set())


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had been compiled."""
    monkeypatch.setattr(_extension, "_load", lambda: (None, WHY))
    backends._reason.cache_clear()
    yield
    backends._reason.cache_clear()


def left(report: Report) -> dict[str, str | None]:
    return {decision.name: decision.reason for decision in report.left}


# --------------------------------------------------------------------------- what it says


def test_print_fits_a_screen():
    model = timm.create_model("swin_tiny_patch4_window7_224")
    for index, name in enumerate(["norm1", "norm2", "attn"]):
        model.layers[2].blocks[index].get_submodule(name).register_forward_hook(lambda m, args, output: None)
    report = af.accelerate(model)
    lines = str(report).splitlines()
    assert lines[0] == "79 modules accelerated, 1 left as they are"
    assert len(lines) < 24 and max(map(len, lines)) <= 120
    assert "    52 Linear                -> FastLinear" in lines
    assert "     1 SwinTransformerBlock  its attn has a forward hook (layers.2.blocks.2)" in lines
    assert any(line.endswith("on cpu in float32: compiled CPU kernels") for line in lines)
    if library(torch.float32) == ONEDNN:
        assert "  linear on cpu in float32: oneDNN" in lines
    else:
        assert any(line.startswith("  linear") or ", linear" in line for line in lines)
    assert repr(report) == f"<Report: {lines[0]}>"
    html = report._repr_html_()
    assert html.count("<tr>") == len(lines) - 3 and "its attn has a forward hook" in html and "&gt; FastLinear" in html


def test_plain_values_and_tables(monkeypatch):
    report = af.accelerate(swin())
    values = json.loads(json.dumps(report.to_dict()))
    assert values["swapped"] == len(report.swapped) == 28 and values["left"] == 0
    assert {(run["op"], run["backend"], run["missing"]) for run in values["ops"]} == {
        ("window_attention", "cpu", None),
        ("patch_embed", "cpu", None),
        ("patch_merge", "cpu", None),
        ("linear", "cpu", None),
    }
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(af.InputError, match="pip install pandas"):
        report.to_dataframe()
    pandas = types.ModuleType("pandas")
    pandas.DataFrame = lambda rows, columns: (rows, columns)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    rows, columns = report.to_dataframe()
    assert len(rows) == 28 and list(rows[0]) == columns


def test_nothing_known():
    assert "0 modules accelerated: none is of a known class" in str(af.accelerate(nn.Conv2d(2, 2, 1), strict=True))


def test_modules_that_never_gain_are_no_failures():
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), conv_mlp=True, num_classes=3)
    report = af.accelerate(model, strict=True)
    assert report.left == [] and {d.replacement for d in report.swapped} == {"FastLinear"}
    assert "4 Mlp       it is made of convolutions" in str(report)
    odd = nn.ModuleDict(
        {
            "activation": timm.layers.Mlp(4, act_layer=nn.GLU),
            "norm": timm.layers.PatchEmbed(8, 4, 3, 8, norm_layer=timm.layers.LayerNorm2d),
            "subclass": timm.layers.PatchEmbedWithSize(8, 4, 3, 8, norm_layer=nn.LayerNorm),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    report = af.accelerate(odd.double(), strict=True)
    assert report.swapped == report.left == [] and len(report.nothing_to_gain) == 4
    assert str(report).startswith("0 modules accelerated: nothing here would be faster")


# --------------------------------------------------------------------------- what the machine has


def test_without_compiled_kernels_what_is_missing_is_named(no_extension):
    model = swin().eval()
    expected, before = model(images()), classes(model)
    with pytest.raises(af.InputError, match=r"cannot take 6 modules: 4 SwinTransformerBlock: no kernel of window_att"):
        af.accelerate(model, strict=True)
    assert classes(model) == before
    report = af.accelerate(model)
    assert {d.replacement for d in report.swapped} == {"FastLinear", "FastMlp"}  # which torch alone makes faster
    assert set(left(report)) == {
        "patch_embed",
        "layers.1.downsample",
        *(f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)),
    }
    assert left(report)["layers.0.blocks.0"] == f"no kernel of window_attention runs on cpu: {WHY}"
    ops = {run.op: run for run in report.ops}
    assert ops["window_attention"] == OpRun("window_attention", "cpu", "float32", "reference", WHY)
    assert ops["linear"] == OpRun("linear", "cpu", "float32", "cpu", None)
    text = str(report)
    assert text.count("pip install --no-build-isolation .") == 1 and text.startswith("22 modules accelerated, 6 left")
    with warnings.catch_warnings():
        warnings.simplefilter("error", backends.FallbackWarning)
        close(model(images()), expected)


def test_called_again_it_is_up_to_date():
    model = swin()
    af.accelerate(model)
    fast = classes(model)
    block(model).attn.register_forward_hook(lambda m, args, output: None)
    handle = model.layers[1].blocks[0].attn.proj.register_forward_pre_hook(lambda m, args: None)
    assert set(left(af.accelerate(model))) == {"layers.0.blocks.1", "layers.1.blocks.0"}
    assert type(block(model)) is type(model.layers[1].blocks[0]) is SwinTransformerBlock
    block(model).attn._forward_hooks.clear()
    handle.remove()
    assert left(af.accelerate(model)) == {} and classes(model) == fast


def test_warnings_are_one_line():
    with pytest.warns(backends.FallbackWarning) as said:
        backends.notify_once("lines", "compilation failed:\n  error 1\n")
    assert str(said[0].message) == "compilation failed: error 1"


# --------------------------------------------------------------------------- modules in unusual states


def wrap(change: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], object]:
    return lambda attn: attn.__setattr__("proj", change(attn.proj))


def twice(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


def patch_instance(attn: nn.Module) -> None:
    attn.proj.forward = functools.partial(twice, attn.proj)


def make_subclass(attn: nn.Module) -> None:
    attn.proj.__class__ = type("Doubled", (nn.Linear,), {"forward": twice})


def add_parameter(attn: nn.Module) -> None:
    attn.proj.register_parameter("correction", nn.Parameter(torch.zeros(2)))


def compile_inside(attn: nn.Module) -> None:
    attn.proj.compile(backend="eager")


STATES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "instance": (patch_instance, "its attn.proj has a forward of its own"),
    "subclass": (make_subclass, "its attn.proj is a Doubled"),
    "DataParallel": (wrap(nn.DataParallel), "its attn.proj is a DataParallel"),
    "compiled": (wrap(lambda layer: torch.compile(layer, backend="eager")), "its attn.proj is a OptimizedModule"),
    "compiled in place": (compile_inside, "its attn.proj is compiled by itself"),
    "scripted": (wrap(lambda layer: torch.jit.script(af.restore(layer))), "its attn.proj is a RecursiveScriptModule"),
    "parameter": (add_parameter, "its attn.proj: it has a parameter 'correction' that its class does not know"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::asvit_fast.backends.FallbackWarning")
@pytest.mark.parametrize("state", STATES)
def test_states(state):
    change, why = STATES[state]
    model, fast, later = swin().eval(), swin().eval(), swin().eval()
    af.accelerate(later)
    for network in (model, fast, later):
        change(block(network).attn)
    assert left(af.accelerate(fast))["layers.0.blocks.1"] == why
    expected = model(images())
    close(fast(images()), expected)
    close(later(images()), expected)


def test_other_masks_are_not_overlooked():
    model, fast = swin().eval(), swin().eval()
    for network in (model, fast):
        block(network).attn_mask = block(network).attn_mask * 0.01
    assert left(af.accelerate(fast)) == {"layers.0.blocks.1": "its attn_mask is not that of its shift"}
    close(fast(images()), model(images()))


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
@pytest.mark.parametrize("first", [True, False])
def test_patched_classes(monkeypatch, first):
    """Also by a function that looks like the original."""
    model, fast = swin().eval(), swin().eval()
    original = WindowAttention.forward

    @functools.wraps(original)
    def doubled(self: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * original(self, x, mask)

    if not first:
        af.accelerate(fast, strict=True)
    monkeypatch.setattr(WindowAttention, "forward", doubled)
    if first:
        assert "WindowAttention.forward was replaced by" in left(af.accelerate(fast))["layers.0.blocks.0"]
    close(fast(images()), model(images()))
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * linear(self, x))
    close(fast(images()), model(images()))
    monkeypatch.undo()
    assert left(af.accelerate(fast, strict=True)) == {}
    close(fast(images()), model(images()))


def test_tables_of_counters_are_those_of_the_source():
    """And nothing is said, as nobody counts operations to be fast."""
    model = swin().eval()
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(images())
        counts.append({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items() if "attn" in name})
        af.accelerate(model)
    assert counts[0] == counts[1] and len(counts[0]) > 4


def test_shared_modules():
    """One block in two places, one projection in two blocks."""
    model, fast = swin().eval(), swin().eval()
    for network in (model, fast):
        blocks = network.layers[0].blocks
        blocks[1].attn.qkv = blocks[0].attn.qkv
        blocks.append(blocks[1])
    assert left(af.accelerate(fast, strict=True)) == {} and is_fast(block(fast))
    close(fast(images()), model(images()))


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
def test_compiled_networks_notice_changes():
    """Changes of parts that are in no traced operation, too."""
    fast = block(swin()).eval()
    af.accelerate(fast)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    x = torch.randn(1, 11, 11, 16)
    before = compiled(x)
    patch_instance(fast.attn)
    after = compiled(x)
    close(after, fast(x))
    assert not torch.allclose(after, before)
    fast.attn.softmax = nn.Softmin(dim=-1)
    close(compiled(x), fast(x))
    assert not torch.allclose(compiled(x), after)
