"""Digests of what a method does: of its syntax tree and of those of all that it calls in code that is no package.

Formatting, comments, docstrings, annotations, messages of assertions, names of locals, of functions and of classes, and
the names that modules are imported by do not count; names of parameters and attributes, constants, operators and the
order of statements do.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

DIGITS = 16  # of a digest, in hexadecimal
PACKAGES = (  # whose functions are known by their names
    *("torch", "timm", "torchvision", "transformers", "monai", "numpy", "einops"),
    *("math", "functools", "itertools", "operator", "collections", "_operator", "builtins", "typing"),
)
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def is_package(name: str | None) -> bool:
    """Whether a module, by its full name, is of a package that is known by names."""
    return (name or "").partition(".")[0] in PACKAGES


def method_digest(kind: type, name: str) -> str | None:
    """The digest of a method of a class; None if it has none or its source cannot be read."""
    method = inspect.getattr_static(kind, name, None)
    return None if method is None else _digest(kind, method)


@functools.cache
def _digest(kind: type, method: Any) -> str | None:
    try:
        text = _Writer(kind, []).attribute(method)
    except (OSError, SyntaxError, TypeError):
        return None
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _plain(value: Any) -> types.FunctionType | None:
    """The function of a method, a property or a cache."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools._lru_cache_wrapper):
        value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None


def _tree(function: types.FunctionType) -> ast.FunctionDef:
    lines, _ = inspect.getsourcelines(function.__code__)
    source = "".join(lines)
    tree = ast.parse(f"class _:\n{source}" if source[:1].isspace() else source).body[0]
    found = tree.body[0] if isinstance(tree, ast.ClassDef) else tree
    if not isinstance(found, ast.FunctionDef):
        raise SyntaxError("not a function")
    return found


def _parameters(arguments: ast.arguments) -> list[str]:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in (*named, arguments.vararg, arguments.kwarg) if argument is not None]


def _locals(function: ast.FunctionDef) -> set[str]:
    """All names that a function gives to something, but for its parameters."""
    names: set[str] = set()
    outside: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, Function) and node is not function:
            names |= {*_parameters(node.args), getattr(node, "name", "")}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            outside |= set(node.names)
    return names - outside - set(_parameters(function.args))


class _Writer:
    """Writes functions as text that is the same where they do the same."""

    def __init__(self, kind: type, within: list[Any]) -> None:
        self.kind = kind
        self.within = within  # functions that are being written
        self.names: dict[str, int] = {}  # locals by their first appearance
        self.local: set[str] = set()
        self.known: Mapping[str, Any] = {}
        self.first = ""  # name of the first parameter

    def attribute(self, value: Any) -> str | None:
        """A function of a class or module; None for anything else."""
        function = _plain(value)
        if function is None:
            return None
        if function in self.within:
            return f"<again {self.within.index(function)}>"
        return _Writer(self.kind, [*self.within, function]).function(function)

    def function(self, function: types.FunctionType) -> str:
        tree = _tree(function)
        self.local = _locals(tree)
        closure = inspect.getclosurevars(function)
        self.known = {**vars(builtins), **closure.globals, **closure.nonlocals}
        self.first = next(iter(_parameters(tree.args)), "")
        decorators = [self.node(decorator) for decorator in tree.decorator_list]
        return f"function({decorators} {self.node(tree.args)} {self.body(tree.body)})"

    def body(self, statements: list[ast.stmt]) -> str:
        return "[" + "; ".join(text for statement in statements if (text := self.node(statement))) + "]"

    def node(self, node: Any) -> str:
        if isinstance(node, list):
            return self.body(node)
        if not isinstance(node, ast.AST):
            return repr(node)
        special = getattr(self, f"on_{type(node).__name__}", None)
        return special(node) if special else self.plain(node)

    def plain(self, node: ast.AST) -> str:
        return f"{type(node).__name__}({' '.join(self.fields(node))})"

    def fields(self, node: ast.AST) -> Iterator[str]:
        for name, value in ast.iter_fields(node):
            if name not in ("ctx", "kind", "type_comment", "type_params") and value not in (None, []):
                yield f"{name}={self.node(value)}"

    def on_Expr(self, node: ast.Expr) -> str:
        return "" if isinstance(node.value, ast.Constant) else self.plain(node)

    def on_Pass(self, node: ast.Pass) -> str:
        return ""

    def on_Assert(self, node: ast.Assert) -> str:
        return f"Assert({self.node(node.test)})"

    def on_AnnAssign(self, node: ast.AnnAssign) -> str:
        return "" if node.value is None else f"Assign(targets=[{self.node(node.target)}] value={self.node(node.value)})"

    def on_FunctionDef(self, node: ast.FunctionDef) -> str:
        return f"def {self.name(node.name)}({self.node(node.args)} {self.body(node.body)})"

    def on_arg(self, node: ast.arg) -> str:
        return self.name(node.arg) if node.arg in self.local else node.arg

    def name(self, name: str) -> str:
        return f"local {self.names.setdefault(name, len(self.names))}"

    def on_Name(self, node: ast.Name) -> str:
        if node.id in self.local:
            return self.name(node.id)
        return self.outer(self.known[node.id], node.id) if node.id in self.known else f"<{node.id}>"

    def outer(self, value: Any, name: str) -> str:
        """A name from outside of the function, by what it stands for."""
        if isinstance(value, types.ModuleType):
            return f"<module {value.__name__}>"
        module = getattr(value, "__module__", None)
        if isinstance(value, type):
            return "<own class>" if value in self.kind.__mro__ else f"<class {value.__name__}>"
        if callable(value) and is_package(module):
            return f"<{module}.{getattr(value, '__qualname__', name)}>"
        return self.attribute(value) or f"<{value!r}>"

    def on_Attribute(self, node: ast.Attribute) -> str:
        """An attribute; a method of the class itself is part of what its caller does."""
        owner = node.value
        if not isinstance(owner, ast.Name) or owner.id in self.local:
            return self.plain(node)
        own = owner.id == self.first or any(self.known.get(owner.id) is kind for kind in self.kind.__mro__)
        written = self.attribute(inspect.getattr_static(self.kind, node.attr, None)) if own else None
        return self.plain(node) if written is None else f"<method {written}>"

    def on_Call(self, node: ast.Call) -> str:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return f"<super {[f'{base.__module__}.{base.__qualname__}' for base in self.kind.__mro__[1:]]}>"
        return self.plain(node)
