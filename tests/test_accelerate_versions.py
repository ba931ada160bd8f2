"""Packages of a version that has other names: modules are left alone with the reason, whatever is missing."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
from test_accelerate_families import MODELS, prepared
from tiny_swin import needs_kernels
from torch import nn

import asvit_fast as af
from asvit_fast.acceleration import FAMILIES
from asvit_fast.acceleration.replacement import Replacement, parts_of

pytestmark = needs_kernels
MAKERS = {
    **{name: make for name, (make, _, _) in MODELS.items() if " " not in name or name in ("torchvision v2",)},
    "maxvit": MODELS["maxvit tf"][0],
    "maxvit parallel": MODELS["maxvit parallel"][0],
    "embedding": lambda: nn.Sequential(timm.layers.PatchEmbed(32, 4, 3, 8, norm_layer=nn.LayerNorm)),
}


def replaced(model: nn.Module) -> dict[type[Replacement], str]:
    """Each class that ``accelerate`` gave, with the name of a module that has it."""
    return {type(module): name for name, module in model.named_modules() if isinstance(module, Replacement)}


def take_away(module: nn.Module, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, _, name = path.rpartition(".")
    part: Any = next(parts_of(module, [owner]))[1] if owner else module
    for place in (part.__dict__, part._parameters, part._buffers, part._modules):
        place.pop(name, None)
    for kind in type(part).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)


def check_renamed_attributes(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a model without an attribute that their replacements read are left alone with that reason."""
    model = prepared(make)
    af.accelerate(model)
    for kind, module_name in replaced(model).items():
        for path in kind.reads:
            model = prepared(make)
            with monkeypatch.context() as patch:
                take_away(model.get_submodule(module_name), path, patch)
                left = {decision.name: decision.reason for decision in af.accelerate(model).left}
            assert left[module_name] == f"this version of its package is not known: its {path} is missing"


@pytest.mark.parametrize("name", MAKERS)
def test_a_renamed_attribute_is_a_version_that_is_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_renamed_attributes(MAKERS[name], monkeypatch)


ROOTS = ("self", "module", "block", "attn", "attention")  # names of variables that hold modules of packages


def attributes_read(code: ast.AST) -> set[str]:
    """Attributes of modules of packages, by path without the first ones of `self.attn` and the like."""
    names = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ROOTS:
            names.add(node.attr)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            inner = node.value
            if isinstance(inner.value, ast.Name) and inner.value.id in ROOTS and inner.attr.startswith("attn"):
                names.add(node.attr)
    return names


def files_of(package: str) -> list[str]:
    """Files of replacements for classes of a package."""
    files = {family.replacement.partition(".")[0] for family in FAMILIES if family.replacement}
    return sorted(file for file in files if file.startswith(package))


def check_declared_attributes(file: str) -> None:
    """What replacements read of modules of packages is in their `reads`."""
    module = importlib.import_module(f"asvit_fast.acceleration.{file}")
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, Replacement)]
    declared = {path.rpartition(".")[2] for kind in kinds for path in kind.reads}
    declared |= {path.rpartition(".")[2] for kind in kinds for path in kind.parts}  # looked at by bypass_reason
    declared |= {path for kind in kinds for path in getattr(kind, "structure", ())}
    of_module = {"training", "_modules", "_parameters", "source"}
    own = {name for kind in kinds for base in kind.__mro__ if issubclass(base, Replacement) for name in vars(base)}
    assert attributes_read(ast.parse(inspect.getsource(module))) <= declared | own | of_module


STRUCTURES = sorted({family.replacement.partition(".")[0] for family in FAMILIES if family.by_structure})


@pytest.mark.parametrize("file", [*files_of("timm"), *files_of("torchvision"), *STRUCTURES])
def test_attributes_that_are_read_are_declared(file: str) -> None:
    check_declared_attributes(file)
