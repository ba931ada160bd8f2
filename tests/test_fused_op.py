"""The calls of fused ops, in which they must be like torch's own functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils.flop_counter import FlopCounterMode

from asvit_fast import ops

Case = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]

CASES: dict[str, Case] = {  # each op on the shapes of its operands; linear's product is large enough for oneDNN
    "window_attention": (
        lambda qkv, bias: ops.window_attention(qkv, 2, (2, 2), (1, 1), bias),
        ((1, 4, 4, 24), (2, 4, 4)),
    ),
    "patch_merge": (
        lambda x, weight, norm, bias: ops.patch_merge(x, weight, 2, 2, norm, None, bias),
        ((1, 4, 4, 4), (8, 16), (16,), (8,)),
    ),
    "patch_embed": (
        lambda x, weight, norm: ops.patch_embed(x, weight, None, 4, 1, (0, 0, 0, 0), norm),
        ((1, 3, 8, 8), (8, 3, 4, 4), (8,)),
    ),
    "linear": (ops.linear, ((4, 196, 128), (256, 128), (256,))),
}
every_op = pytest.mark.parametrize("case", CASES)


def prepared(case: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    return function, [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", [name for name in CASES if name != "window_attention"])  # whose gradients read it
def test_output_can_change_in_place(case: str) -> None:
    """As in `x = layer(x); x += shortcut`: the output is no view of anything."""
    function, operands = prepared(case)
    output = function(*operands)
    wanted = torch.autograd.grad(output.sum(), operands, retain_graph=True)
    output += 1
    got = torch.autograd.grad(output.sum(), operands)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("case", ["linear", "patch_merge"])
def test_bias_can_change_before_the_backward_pass(case: str) -> None:
    """No gradient depends on it."""
    function, operands = prepared(case)
    wanted = torch.autograd.grad(function(*operands).sum(), operands)
    output = function(*operands)
    with torch.no_grad():
        operands[-1].add_(1)
    got = torch.autograd.grad(output.sum(), operands)
    assert all(map(torch.equal, got, wanted))


@every_op
def test_compiled_autograd(case: str) -> None:
    function, operands = prepared(case)
    wanted = torch.autograd.grad(function(*operands).square().sum(), operands)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        function(*operands).square().sum().backward()
    for operand, gradient in zip(operands, wanted, strict=True):
        torch.testing.assert_close(operand.grad, gradient)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_with_a_bias_for_every_row(device: str) -> None:
    """torch's own function takes it, also where nothing but FLOPs is wanted."""
    shapes = (4, 50, 20), (30, 20), (50, 30)
    x, weight, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    with FlopCounterMode(display=False) as counter:
        (gradient,) = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), x, create_graph=True)
        gradient.sum().backward()
    assert counter.get_total_flops() > 3 * 2 * 4 * 50 * 20 * 30


def test_float64_with_dropout_is_torchs() -> None:
    """No kernel of ours could do better: no warning, and the gradient can be differentiated."""
    qkv = torch.randn(1, 4, 4, 24, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        output = ops.window_attention(qkv, 2, (2, 2), (1, 1), dropout=0.5)
        (gradient,) = torch.autograd.grad(output.square().sum(), qkv, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), qkv)
    assert second.isfinite().all() and second.any()
