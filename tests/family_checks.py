"""What tests of every family of ``accelerate`` have in common: a network against itself before modules were swapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.acceleration.replacement import Replacement

Model = tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]  # a network, its input's shape, classes that come


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    """Weights so large that attention is far from uniform and no bias is zero."""
    torch.manual_seed(0)
    model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if "bias_table" in name or "attention_biases" in name else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def fast_classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, Replacement)}


def tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors of an output: itself, a sequence, or one of transformers'."""
    if isinstance(output, Tensor):
        return (output,)
    return output.to_tuple() if hasattr(output, "to_tuple") else tuple(output)


def check_swapped(case: Model, dtype: torch.dtype) -> None:
    """Outputs and all gradients, the classes that come, the weights, and the way back."""
    make, shape, expected = case
    model = prepared(make).to(dtype)
    kinds, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    report = af.accelerate(model, strict=True)
    assert expected <= fast_classes(model)
    assert expected <= {decision.replacement for decision in report.swapped}
    result = af.verify(model, sample(shape, dtype), rows=0)
    assert result.ok, result.table()
    assert model.state_dict().keys() == state.keys()
    buffers = {name for name, _ in model.named_buffers()}  # running statistics have moved
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name not in buffers)
    assert [type(module) for module in af.restore(model).modules()] == kinds


def check_float64(case: Model) -> None:
    """Nothing but rounding: far below what a wrong mask, padding or order of channels would make."""
    make, shape, _ = case
    model = prepared(make).double().eval()
    x = sample(shape, torch.float64)
    with torch.no_grad():
        expected = tensors(model(x))
        assert af.accelerate(model).swapped
        for actual, wanted in zip(tensors(model(x)), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
