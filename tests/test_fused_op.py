"""The calls of fused ops, in which they must be like torch's own functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from asvit_fast import InputError, ops, use_backend

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


def test_forced_backward_pass() -> None:
    """`use_backend` holds for the backward pass alone, too."""
    function, operands = prepared("window_attention")
    output = function(*operands)
    with use_backend("cuda"), pytest.raises(InputError, match="cannot run window_attention"):
        output.sum().backward()
    expected = torch.autograd.grad(function(*operands).sum(), operands)
    output = function(*operands)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        got = torch.autograd.grad(output.sum(), operands)
    assert not any("asvit_fast_C" in str(name) for name in counter.get_flop_counts()["Global"])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linear_of_a_distributed_tensor(tmp_path: Path) -> None:
    """As in tensor parallelism: torch's function has a sharding strategy, a custom op has none."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        function, operands = prepared("linear")
        shared = [distribute_tensor(x.detach(), mesh, [Replicate()]).requires_grad_() for x in operands]
        got = torch.autograd.grad(function(*shared).sum(), shared)
        wanted = torch.autograd.grad(function(*operands).sum(), operands)
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(got, wanted, strict=True):  # sums of 784 products, in any order
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-4)


@every_op
def test_batches_of_gradients(case: str) -> None:
    """Those of ``is_grads_batched``, as Jacobians are computed with."""
    function, tensors = prepared(case)
    output = function(*tensors)
    batch = torch.randn(3, *output.shape, dtype=output.dtype)
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(output, tensors, batch, is_grads_batched=True, **options)
    for index, gradient in enumerate(batch):
        expected = torch.autograd.grad(output, tensors, gradient, **options)
        torch.testing.assert_close([x[index] for x in found], list(expected), rtol=2e-4, atol=2e-4)


@every_op
def test_saved_tensors_are_read_once(case: str) -> None:
    """As selective checkpoints want it, also where a dispatch mode looks on."""
    from torch.utils.flop_counter import FlopCounterMode

    function, tensors = prepared(case)
    kept: list[Tensor] = []
    read: list[int] = []

    def keep(x: Tensor) -> int:
        kept.append(x)
        return len(kept) - 1

    def give(index: int) -> Tensor:
        read.append(index)
        return kept[index]

    with torch.autograd.graph.saved_tensors_hooks(keep, give), FlopCounterMode(display=False):
        function(*tensors).sum().backward()
    assert len(read) == len(set(read)) > 0
