"""Calls of an accelerated network's submodules, as users see them: those of the source, in its order and shapes."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_accelerate_families import MODELS, image, prepared
from tiny_swin import needs_kernels
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import asvit_fast as af
from asvit_fast.acceleration.replacement import Replacement

NAMES = (  # one of each family, with windows that do not divide the map where it allows that
    *("swin padded", "swinv2 padded", "swinv2 separate bias", "swinv2_cr", "maxvit tf", "maxvit parallel"),
    *(
        "tiny_vit padded",
        "davit padded",
        "twins padded",
        "nest",
        "pvt_v2",
        "torchvision padded",
        "torchvision v2 padded",
    ),
)
FEW = ("swin padded", "tiny_vit padded", "davit padded", "twins padded")
pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning", "ignore::FutureWarning"),
]
Change = Callable[[nn.Module], object]


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, the same accelerated, an image."""
    make, size, _ = MODELS[name]
    model = prepared(make).double()
    for module in model.modules():
        if hasattr(module, "inplace"):  # torch forbids that behind a backward hook
            module.inplace = False
    fast = copy.deepcopy(model)
    af.accelerate(fast)
    return model, fast, image(size, torch.float64)[:1]


def shapes(value: Any) -> Any:
    """Shapes in place of tensors, inside of tuples and dicts as well."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(shapes(item) for item in value)
    return {key: shapes(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def recorded(model: nn.Module, names: list[str], calls: list, backward: bool) -> Iterator[None]:
    """Hooks that write down what they see of the modules of those names."""
    handles = []
    for name in names:

        def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls.append(("pre", name, shapes(args), shapes(kwargs)))

        def after(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
            calls.append(("forward", name, shapes(args), shapes(output)))

        def gradient(m: nn.Module, to_input: Any, to_output: Any, name: str = name) -> None:
            calls.append(("backward", name, shapes(to_input), shapes(to_output)))

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
        if backward:
            handles.append(module.register_full_backward_hook(gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    output = model(x.clone().requires_grad_())
    output.square().sum().backward()
    model.zero_grad()
    return output.detach()


def seen(model: nn.Module, names: list[str], x: Tensor, backward: bool) -> tuple[list, Tensor]:
    calls: list = []
    with recorded(model, names, calls, backward):
        return calls, run(model, x)


def allows_backward_hooks(model: nn.Module, names: list[str], x: Tensor) -> bool:
    """torch forbids them before operations in place, which some networks have."""
    try:
        seen(model, names, x, True)
    except RuntimeError as error:
        return "BackwardHookFunction" not in str(error)
    return True


def groups(fast: nn.Module) -> list[list[str]]:
    """The modules that were replaced and all inside, by the last part of their name: `qkv`, `norm1`, ..."""
    prefixes = tuple(name for name, m in fast.named_modules() if isinstance(m, Replacement) and list(m.children()))
    found: dict[str, list[str]] = {}
    for name, _ in fast.named_modules():
        if name.startswith(prefixes):
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return list(found.values())


@pytest.mark.parametrize("name", NAMES)
def test_hooks_added_later_see_the_calls_of_the_source(name):
    """On one kind of submodule at a time, as hooks on one make whole blocks run as their package does."""
    model, fast, x = pair(name)
    for names in groups(fast):
        backward = allows_backward_hooks(model, names, x)
        (expected, output), (found, fast_output) = (seen(m, names, x, backward) for m in (model, fast))
        assert found == expected, names
        torch.testing.assert_close(fast_output, output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FEW)
def test_hooks_added_before_see_the_calls_of_the_source(name):
    model, fast, x = pair(name)
    for names in groups(fast):
        expected, _ = seen(model, names, x, False)
        hooked = copy.deepcopy(model)
        calls: list = []
        with recorded(hooked, names, calls, False):
            af.accelerate(hooked)
            assert calls == []
            run(hooked, x)
        assert calls == expected, names


@pytest.mark.parametrize("name", FEW)
def test_hooks_of_all_modules(name):
    model, fast, x = pair(name)
    calls: dict[nn.Module, list] = {model: [], fast: []}
    for network, found in calls.items():
        names = {id(module): one for one, module in network.named_modules()}

        def hook(m: nn.Module, args: Any, output: Any, found=found, names=names) -> None:
            found.append((names[id(m)], shapes(args), shapes(output)))

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            network(x)
        finally:
            handle.remove()
    assert calls[model] == calls[fast] and len(calls[model]) > 20
    before = len(calls[fast])
    fast(x)
    assert len(calls[fast]) == before


# --------------------------------------------------------------------------- weights that change when they are read


def of_attention(model: nn.Module, *names: str) -> list[nn.Linear]:
    """The Linear layers of those names."""
    return [m for n, m in model.named_modules() if n.rpartition(".")[2] in names and isinstance(m, nn.Linear)]


STATEFUL: dict[str, Change] = {
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm, hooks": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, hooks": nn.utils.weight_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", amount=0.3),
}


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output of two passes, gradients and buffers."""
    model.train()
    torch.manual_seed(3)
    model(x)
    output = model(x)
    output.square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("first", [True, False], ids=["norm first", "accelerate first"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("swin padded", change) for change in STATEFUL),
        *(
            (name, "spectral_norm")
            for name in ("twins padded", "tiny_vit padded", "davit padded", "torchvision padded")
        ),
    ],
)
def test_stateful_weights(name, change, first):
    make, size, _ = MODELS[name]
    model = prepared(make).double().train()
    fast = copy.deepcopy(model)
    if not first:
        af.accelerate(fast)
    for network in (model, fast):
        torch.manual_seed(1)
        for layer in of_attention(network, "qkv", "proj", "fc1", "reduction"):
            STATEFUL[change](layer)
    before = {key: value.clone() for key, value in fast.state_dict().items()}
    if first:
        assert any("attn" in d.name for d in af.accelerate(fast).left)
    assert all(torch.equal(value, before[key]) for key, value in fast.state_dict().items())
    assert list(fast.state_dict()) == list(model.state_dict())
    x = image(size, torch.float64)
    expected, found = trained(model, x), trained(fast, x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    af.restore(fast)
    assert not any(isinstance(module, Replacement) for module in fast.modules())


# --------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("attention", [False, True], ids=["after projections", "in attention"])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_the_same_seed(name, attention):
    make, size, _ = MODELS[name]
    model = prepared(make).double()
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if path.endswith("attn_drop") == attention else 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout, module.dropout = (0.3, 0.0) if attention else (0.0, 0.3)
    fast = copy.deepcopy(model)
    af.accelerate(fast)
    x = image(size, torch.float64)
    outputs = []
    for network in (model, fast):
        torch.manual_seed(5)
        outputs.append(network(x).detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
