"""FlopCounterMode sees our ops, and counts for them what it counts for the networks they replace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from stacked import needs_extension
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import asvit_fast as af
from asvit_fast import _extension, ops
from asvit_fast.backends import use_backend
from asvit_fast.cost import count_macs


def counted(function: Callable[..., Tensor], *tensors: Tensor, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def test_every_op_has_a_formula() -> None:
    _extension.extension()
    names = [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()]
    ours = {name for name in names if name.split("::")[0] in ("asvit_fast", "asvit_fast_C")}
    assert {"asvit_fast::window_attention_gradients", "asvit_fast::linear", "asvit_fast::gelu_taylor"} <= ours
    packets = {str(packet).replace(".", "::") for packet in flop_registry}
    assert ours <= packets


def tensors(*shapes: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "attention": (lambda qkv, bias: ops.window_attention(qkv, 2, (2, 3), (1, 1), bias), [(2, 4, 6, 24), (2, 6, 6)]),
    "padding": (
        lambda qkv, padding: ops.window_attention(qkv, 2, (2, 3), (1, 1), layout="timm", padding=padding),
        [(2, 5, 7, 24), (24,)],
    ),
    "embedding": (
        lambda x, w, b: ops.patch_embed(x, w, b, 2, 2, (1, 0, 2, 1), b, b),
        [(2, 3, 9, 8), (5, 3, 3, 3), (5,)],
    ),
    "merging": (lambda x, w, g: ops.patch_merge(x, w, 3, 2, g), [(2, 5, 6, 4), (7, 36), (36,)]),
    "linear": (lambda x, w, b: ops.linear(x, w, b), [(3, 500, 96), (96, 96), (96,)]),
    "linear + gelu": (lambda x, w, b: ops.linear(x, w, b, "gelu"), [(3, 500, 96), (96, 96), (96,)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_as_the_reference(name: str) -> None:
    """On the CPU and on the meta device, with all gradients and without."""
    call, shapes = CALLS[name]
    for backward in (False, True):
        with use_backend("reference"):
            want = counted(call, *tensors(*shapes), backward=backward)
        assert want > 0
        assert counted(call, *tensors(*shapes), backward=backward) == want
        assert counted(call, *tensors(*shapes, device="meta"), backward=backward) == want


@pytest.mark.parametrize("name", ["embedding", "merging"])
def test_only_gradients_that_are_asked_for(name: str) -> None:
    call, shapes = CALLS[name]
    forward = counted(call, *tensors(*shapes), backward=False)
    first, *rest = tensors(*shapes)
    assert counted(call, first.detach(), *rest) == 2 * forward
    assert counted(call, first, *(tensor.detach() for tensor in rest)) == 2 * forward


def test_padding_that_nobody_attends() -> None:
    """It is in no window, and windows larger than the map are the map: 9 + 1 and 25 pairs."""
    (qkv,) = tensors((1, 4, 5, 24))
    assert counted(lambda x: ops.window_attention(x, 2, (3, 9)), qkv, backward=False) == 4 * 8 * (9 + 1) * 25


@pytest.mark.parametrize("orders", [0, 1, 2])
def test_taylor(orders: int) -> None:
    def call(x: Tensor) -> Tensor:
        x = ops.window_attention_taylor(x, 2, (2, 3))
        return ops.softmax_taylor(ops.layer_norm_taylor(ops.tanh_taylor(ops.gelu_taylor(x))))

    (stack,) = tensors((orders + 1, 2, 4, 6, 24))
    want = counted(lambda x: ops.window_attention(x, 2, (2, 3)), stack[0], backward=False)
    assert counted(call, stack, backward=False) == want * (orders + 1) * (orders + 2) // 2


@needs_extension
def test_compiled_ops_called_by_themselves() -> None:
    settings = (*[None] * 6, 2, [2, 3], [1, 1], [], 0.5, "masked")
    (qkv,) = tensors((2, 4, 6, 24))
    compiled, qkv = torch.ops.asvit_fast_C, qkv.detach()
    output, statistics = compiled.window_attention(qkv, *settings)
    forward = counted(lambda: compiled.window_attention(qkv, *settings)[0], backward=False)
    arguments = (output, output, statistics, qkv, *settings, [False] * 7)
    backward = counted(lambda: compiled.window_attention_backward(*arguments)[0], backward=False)
    assert (forward, backward) == (2 * 4 * 8 * 4 * 36, 2 * forward)


def small_swin() -> nn.Module:
    options = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return timm.models.SwinTransformer(**options, num_classes=3).eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_accelerated_swin_counts_as_its_source(device: str) -> None:
    model, (image,) = small_swin().to(device), tensors((1, 3, 32, 32), device=device)
    image = image.detach()
    want = [counted(model, image, backward=backward) for backward in (False, True)]
    af.accelerate(model)
    assert [counted(model, image, backward=backward) for backward in (False, True)] == want


def test_our_networks() -> None:
    """Windows here divide no map."""
    model = af.create_model("4,3,2|2,2,2|2,1,2|2,1,2|16", img_size=40, num_classes=3).eval()
    assert counted(model, torch.randn(1, 3, 40, 40), backward=False) == 2 * count_macs(model, 40)


def test_under_compile() -> None:
    """torch runs compiled functions eagerly while it counts; the graph of an exported network has our ops."""
    call, shapes = CALLS["attention"]
    want = counted(call, *tensors(*shapes))
    assert counted(torch.compile(call, backend="aot_eager"), *tensors(*shapes)) == want
    model = small_swin()
    af.accelerate(model)
    image = torch.randn(1, 3, 32, 32)
    exported = torch.export.export(model, (image,)).module()
    assert counted(exported, image, backward=False) == counted(model, image, backward=False)


@needs_extension
def test_per_sample_gradients_and_norms() -> None:
    kernels = torch.ops.asvit_fast_C
    x, gradient = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    assert counted(kernels.gram, x.flatten(1), backward=False) == 2 * 3 * 3 * 40
    assert counted(kernels.linear_weight_gram, x, gradient, backward=False) == 2 * (15 * 8 * 6 + 9 * 8 * 6)
    assert (
        counted(kernels.layer_norm_weight_rows, x, x[..., 0].contiguous(), x[..., 0].contiguous(), x, backward=False)
        == 0
    )
    packed, norm = kernels.linear_pack(torch.randn(7, 8)), torch.ones(8)
    call = lambda x: kernels.norm_linear(x, norm, norm, 1e-5, packed, 7, None, "none")  # noqa: E731
    assert counted(call, x, backward=False) == 2 * 15 * 8 * 7
