"""What modules get back after a while: their flags of training and evaluation mode, attributes that a forward pass set;
dropout off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextlib.contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Modes may change inside."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside."""
    with restored_modes(model):
        model.eval()
        yield


@contextlib.contextmanager
def restored_attributes(model: nn.Module) -> Iterator[None]:
    """What a forward pass keeps in its modules, such as a constant on the device of its input, goes with it."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


DROPOUT = ("dropout", "attention_dropout", "dropout_prob")  # probabilities that modules hand to a function


def without_dropout(model: nn.Module, stochastic_depth: bool = False) -> nn.Module:
    """Switch dropout off, in place; with ``stochastic_depth`` that of timm, torchvision and transformers, too."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) or (stochastic_depth and type(module).__name__ == "StochasticDepth"):
            module.p = 0.0  # type: ignore[assignment]
        names = (*DROPOUT, "drop_prob") if stochastic_depth else DROPOUT
        for name in names:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model
