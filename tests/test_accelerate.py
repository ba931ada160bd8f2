"""accelerate, restore and verify: what changes in a model, what does not, and what is said about it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.utils import ModelEmaV3
from tiny_swin import SIZE, block, classes, close, images, is_fast, needs_kernels, swin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

import asvit_fast as af
from asvit_fast import backends

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_notified", set())


# --------------------------------------------------------------------------- what stays as it is


def test_restore_undoes_it_and_both_may_be_called_again():
    model = swin()
    before, expected = classes(model), model(images())
    report = af.accelerate(model, strict=True)
    fast = classes(model)
    assert fast != before and len(report.swapped) == 28 and report.left == []
    again = af.accelerate(model, strict=True)
    assert classes(model) == fast and [d.name for d in again.swapped] == [d.name for d in report.swapped]
    close(model(images()), expected)
    assert af.restore(model) is model
    assert classes(model) == before
    assert torch.equal(model(images()), expected)
    af.restore(model)
    assert classes(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated_and_can_be_restored(copied):
    model = swin().eval()
    before, expected = classes(model), model(images())
    af.accelerate(model)
    twin = copied(model)
    assert classes(twin) == classes(model) and torch.equal(twin(images()), model(images()))
    af.restore(twin)
    assert classes(twin) == before and torch.equal(twin(images()), expected)
    assert is_fast(model)


def test_saved_whole_and_loaded_elsewhere():
    model = swin().eval()
    af.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    program = (
        "import sys, io, torch, asvit_fast; assert 'asvit_fast.acceleration.timm_swin' not in sys.modules; "
        "model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False); "
        "print(type(model.layers[0].blocks[0]).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", program], input=file.getvalue(), capture_output=True, check=False)
    assert result.stdout.decode().strip() == "FastSwinTransformerBlock", result.stderr.decode()


def test_state_dict_goes_both_ways():
    model, fast = swin(), swin()
    af.accelerate(fast)
    assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fast.load_state_dict(model.state_dict(), strict=True)
    close(fast.eval()(images()), model.eval()(images()))
    model.load_state_dict(fast.state_dict(), strict=True)


def test_optimizer_made_before_keeps_its_parameters():
    model, fast = swin(), swin()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, fast)]
    af.accelerate(fast)
    for _ in range(3):
        for m, optimizer in zip((model, fast), optimizers, strict=True):
            optimizer.zero_grad()
            m(images()).square().sum().backward()
            optimizer.step()
    close(fast(images()), model(images()))


def test_training_mode_requires_grad_and_hooks_stay():
    model = swin().eval()
    block(model).train()
    model.patch_embed.requires_grad_(False)
    seen: list[torch.Size] = []
    block(model).register_forward_hook(lambda m, args, output: seen.append(output.shape))
    flags = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    report = af.accelerate(model, strict=True)
    assert report.left == []
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    model(images())
    assert seen == [(2, 11, 11, 16)]
    assert isinstance(block(model), SwinTransformerBlock) and is_fast(block(model))


def test_ema_of_timm():
    model = swin()
    af.accelerate(model)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    assert is_fast(ema.module) and ema.module(images()).isfinite().all()


def test_other_input_and_window_sizes_afterwards():
    model, fast = swin(), swin()
    af.accelerate(fast)
    for m in (model, fast):
        m.eval().set_input_size((64, 64), window_size=5)
    x = torch.randn(1, 3, 64, 64)
    close(fast(x), model(x))


class Adapter(nn.Module):
    """A low rank correction of a Linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
@pytest.mark.parametrize("first", [True, False])
def test_adapters_on_projections(first):
    model = swin().eval()
    if first:
        af.accelerate(model, strict=True)
    for attention in [m for m in model.modules() if isinstance(m, WindowAttention)]:
        attention.qkv, attention.proj = Adapter(attention.qkv), Adapter(attention.proj)
    found = reasons(model)
    assert set(found.values()) == {"its attn.qkv is a Adapter"} and len(found) == 4
    assert is_fast(model) and not is_fast(block(model).drop_path1)
    fast = model(images())
    close(fast, af.restore(model)(images()))


def test_quantised_linear_layers():
    model = torch.ao.quantization.quantize_dynamic(swin().eval(), {nn.Linear})
    expected = model(images())
    report = af.accelerate(model)
    assert {d.replacement for d in report.swapped} == {"FastPatchEmbed"}
    assert {d.reason for d in report.left} == {
        "its attn.qkv is a Linear",
        "its fc1 is a Linear",
        "its reduction is a Linear",
    }
    close(model(images()), expected)


class Seen(TorchFunctionMode):
    """Counts softmax and Linear layers, which fused ops contain."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (nn.functional.linear, nn.functional.scaled_dot_product_attention, Tensor.softmax)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
def test_function_modes_see_every_function():
    model = swin().eval()
    fast = copy.deepcopy(model)
    af.accelerate(fast)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with Seen() as source:
                expected = model(images())
            with Seen() as ours:
                close(fast(images()), expected)
            assert ours.count == source.count > 0


def test_a_part_that_refers_to_its_network_does_not_keep_it():
    model = swin().eval()
    af.accelerate(model)
    model.layers[0].blocks[0].attn.__dict__["owner"] = model
    with torch.no_grad():
        model(images())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def replaced_weight(model: nn.Module) -> weakref.ref[Tensor]:
    attention = next(m for m in model.modules() if isinstance(m, WindowAttention))
    old = weakref.ref(attention.qkv.weight)
    attention.qkv = nn.Linear(attention.qkv.in_features, attention.qkv.out_features)
    gc.collect()
    return old


def test_replaced_weights_are_freed():
    model = swin().eval()
    af.accelerate(model)
    with torch.no_grad():
        model(images())
        old = replaced_weight(model)
        model(images())
        assert old() is None
        assert replaced_weight(af.restore(model))() is None


@pytest.mark.parametrize("inplace", [False, True])
def test_quantising_afterwards_is_refused(inplace):
    model = swin().eval()
    af.accelerate(model)
    with pytest.raises(af.InputError, match=r"each Fast\w+ as it is: call asvit_fast.restore\(model\), quantise, then"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=inplace)
    quantised = torch.ao.quantization.quantize_dynamic(af.restore(model), {nn.Linear}, inplace=inplace)
    assert type(block(quantised).attn.qkv) is torch.ao.nn.quantized.dynamic.Linear


# --------------------------------------------------------------------------- compilers, precision, sharding


def test_compiles_into_one_graph():
    model = swin()
    af.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for m in (model, compiled):
        model.zero_grad()
        m(images()).square().sum().backward()
        gradients.append(block(model).attn.relative_position_bias_table.grad.clone())
    close(*gradients)
    close(compiled(images()), model(images()))


def test_export():
    model = swin().eval()
    af.accelerate(model)
    exported = torch.export.export(model, (images(),))
    close(exported.module()(images()), model(images()))


def test_autocast():
    model = swin()
    with torch.autocast("cpu", torch.bfloat16):
        result = af.verify(model, images(), rows=0)
    assert result.ok, result.table()
    assert max(d.source_error for d in result.differences if d.name == "output") > 1e-4  # it was in bfloat16


def test_activation_checkpointing():
    model = swin()
    af.accelerate(model)
    model(images()).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images()).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_function_transforms():
    model = swin().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (images(),)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    af.accelerate(model)
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)


def test_taylor_propagation():
    model = swin().double().eval()
    x, dx = images().double(), torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    expected = af.jvp(model, x, dx)
    af.accelerate(model)
    for actual, wanted in zip(af.jvp(model, x, dx), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", [False, True])
def test_sharded(process_group, attention):
    model, fast = swin(), swin()
    af.accelerate(fast, strict=True)
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in reversed(list(fast.modules())):  # inner ones first
        if isinstance(module, (SwinTransformerBlock, WindowAttention) if attention else SwinTransformerBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(fast, mesh=mesh)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", backends.FallbackWarning)
        for m in (model, fast):
            m(images()).square().sum().backward()
    fallbacks = {str(one.message) for one in said if one.category is backends.FallbackWarning}
    assert fallbacks == (
        {"asvit_fast runs SwinTransformerBlock as its package does: its attn is a FSDPWindowAttention"}
        if attention
        else set()
    )
    for expected, parameter in zip(model.parameters(), fast.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, rtol=1e-3, atol=1e-3)
    af.restore(fast)
    assert not is_fast(fast) and type(block(fast)).__name__ == "FSDPSwinTransformerBlock"
    fast(images()).sum().backward()
    left = af.accelerate(fast).left
    assert "FSDPSwinTransformerBlock is not exactly" in next(d.reason for d in left if d.name == "layers.0.blocks.1")


def test_parametrised_weights():
    model = swin().eval()
    af.accelerate(model, strict=True)
    nn.utils.parametrizations.weight_norm(block(model).attn.qkv)
    nn.utils.parametrizations.weight_norm(block(model).mlp.fc1)
    with pytest.warns(backends.FallbackWarning, match=r"its attn.qkv is a ParametrizedFastLinear"):
        fast = model(images())
    close(fast, af.restore(model)(images()))
    assert is_fast(model) is False


# --------------------------------------------------------------------------- what is left alone, and the reason


class MyBlock(SwinTransformerBlock):
    """A user's own version."""

    def _attn(self, x: Tensor) -> Tensor:
        return 2 * super()._attn(x)


def reasons(model: nn.Module) -> dict[str, str]:
    return {decision.name: decision.reason for decision in af.accelerate(model).left}


def test_subclass_is_left():
    model = swin()
    block(model).__class__ = MyBlock
    expected = model(images())
    found = reasons(model)
    assert set(found) == {"layers.0.blocks.1"}
    assert "test_accelerate.MyBlock is not exactly timm.models" in found["layers.0.blocks.1"]
    assert type(block(model)) is MyBlock
    close(model(images()), expected)


def patched(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


def test_patched_methods_are_left(monkeypatch):
    model = swin()
    block(model)._attn = lambda x: x
    assert reasons(model)["layers.0.blocks.1"] == "its _attn was replaced on the instance"
    monkeypatch.setattr(SwinTransformerBlock, "_attn", patched)
    assert "SwinTransformerBlock._attn was replaced by" in reasons(swin())["layers.0.blocks.1"]


def test_hooks_that_would_not_see_what_they_saw():
    model = swin()
    block(model).attn.register_forward_hook(lambda m, args, output: None)
    model.get_submodule("layers.1.blocks.0.attn.softmax").register_forward_hook(lambda m, args, output: None)
    model.get_submodule("layers.1.downsample.norm").register_forward_pre_hook(lambda m, args: None)
    model.get_submodule("layers.1.blocks.0.mlp.act").register_forward_pre_hook(lambda m, args: None)
    assert reasons(model) == {
        "layers.0.blocks.1": "its attn has a forward hook",
        "layers.1.blocks.0": "its attn.softmax has a forward hook",
        "layers.1.downsample": "its norm has a forward pre-hook",
        "layers.1.blocks.0.mlp": "its act has a forward pre-hook",
    }


def test_strict_names_what_cannot_be_taken_and_changes_nothing():
    model = swin()
    block(model).attn.softmax = nn.Softmin(dim=-1)
    why = r"cannot take 1 modules: 1 SwinTransformerBlock: its attn.softmax is a Softmin \(layers.0.blocks.1\)$"
    with pytest.raises(af.InputError, match=why):
        af.accelerate(model, strict=True)
    assert not is_fast(model)
    assert af.accelerate(nn.Conv2d(2, 2, 1), strict=True).decisions == ()


def test_hooks_that_come_later_are_obeyed_and_said_once():
    model = swin().eval()
    expected = model(images())
    af.accelerate(model, strict=True)
    seen = []
    block(model).attn.softmax.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    with pytest.warns(backends.FallbackWarning, match="as its package does: its attn.softmax has"):
        close(model(images()), expected)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
    block(model).attn = Adapter(nn.Linear(16, 16))
    with pytest.warns(backends.FallbackWarning, match="its attn is a Adapter"), pytest.raises(TypeError):
        model(images())


def test_attention_dropout_is_torchs_with_the_same_mask_and_said_once(monkeypatch):
    model = swin(attn_drop_rate=0.5)
    torch.manual_seed(3)
    expected = model(images())
    af.accelerate(model, strict=True)
    torch.manual_seed(3)
    with pytest.warns(backends.FallbackWarning, match="attention dropout has no kernel") as said:
        close(model(images()), expected)
    assert len(said) == 1
    model.eval()(images())
    monkeypatch.setenv("ASVIT_FAST_STRICT", "1")
    with pytest.raises(backends.FallbackWarning):
        model.train()(images())


def test_package_of_another_version_is_left_with_the_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "asvit_fast.acceleration.timm_swin", None)
    found = reasons(swin())
    assert "this version of its package is not known" in found["layers.0.blocks.0"]
