"""Rules of CONTRIBUTING.md that a machine can check: imports only go down, kernels stand alone, files stay short."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAXIMUM_LINES = 500
CONTRACT = {  # methods that mean what torch and timm say they mean
    "forward",
    "forward_head",
    "get_classifier",
    "group_matcher",
    "no_weight_decay",
    "set_grad_checkpointing",
}

# what each part of the package may import, besides itself and what those may import in turn
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "_registration": set(),
    "_build": set(),
    "_extension": {"_build"},
    "memory": {"_extension"},
    "files": {"errors"},
    "machine": set(),
    "cuda_capture": set(),
    "malloc": {"errors"},
    "topology": {"errors"},
    "settings": {"topology"},
    "backends": {"_extension", "errors", "settings"},
    "ops": {"backends", "machine"},
    "tokens": {"errors"},
    "nn": {"ops", "tokens"},
    "taylor": {"ops"},
    "models": {"nn", "settings"},
    "modes": set(),
    "cost": {"models", "files", "modes"},
    "latency": {"cost"},
    "images": {"settings", "files"},
    "scoring": {"taylor", "models", "images", "cuda_capture", "memory"},
    "folder_lock": {"errors"},
    "run_directory": {"machine", "files", "folder_lock"},
    "processes": {"errors"},
    "recipe": {"errors"},
    "search": {"scoring", "models", "cost", "latency", "run_directory", "processes"},
    "training": {"models", "acceleration", "cost", "images", "run_directory", "processes", "recipe"},
    "studies": {"search", "training", "runs"},
    "acceleration": {"models", "modes"},
    "detection": {"training"},
    "graph": {"models", "modes"},
    "runs": {"run_directory"},
    "what": {"models", "runs", "training"},
    "model_card": {"runs", "training"},
    "export": {"what", "graph", "model_card"},
    "bench": {"cuda_capture", "acceleration", "cost", "export", "environment", "memory"},
    "report": {"runs", "topology", "bench", "detection", "studies"},
    "capabilities": {"ops"},
    "environment": {"capabilities", "machine"},
    "cli": {"search", "training", "studies", "detection", "acceleration", "export", "report", "environment", "bench"},
    "timm": {"training"},
    "demo": {"cli"},
    "__main__": {"cli", "malloc"},
    "__init__": {"cli", "_registration"},
}


@functools.cache
def allowed(part: str) -> frozenset[str]:
    """Everything that a part may import."""
    below = LAYERS[part]
    return frozenset({part, "errors", "_version"}).union(below, *(allowed(other) for other in below))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "asvit_fast").parts[0].removesuffix(".py")


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute name, whether it is imported with the file) of every import; each imported name counts as one."""
    tree = ast.parse(path.read_text())
    lazily = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((f"{module}.{alias.name}", id(node) not in lazily) for alias in node.names)


def top(module: str) -> str:
    return module.split(".")[0]


FILES = python_files("asvit_fast")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    part = part_of(path)
    assert part in LAYERS, f"{part} is new: say in LAYERS what it may import"
    for module, eagerly in imports(path):
        if top(module) == "kernels":
            pytest.fail(f"{module}: the kernels are asvit_fast.kernels; `kernels` is somebody else's package")
        if top(module) == "triton":
            pytest.fail(f"imports {module}: only kernels/ does")
        if top(module) != "asvit_fast" or module.count(".") == 0:
            continue
        target = module.split(".")[1]
        if target == "kernels":
            assert part in ("ops", "bench"), f"{module}: kernels are called by ops"
            assert not eagerly, f"{module}: kernels are imported when first needed, inside a function"
        elif target in LAYERS:
            assert target in allowed(part), f"{part} may not import {module}"
        else:  # a name of asvit_fast/__init__.py
            assert part in ("__init__", "__main__", "cli", "demo") or target in ("__version__", "_C"), (
                f"{part} imports {module}: import it from where it is defined"
            )


@pytest.mark.parametrize("path", python_files("kernels"), ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    for module, _ in imports(path):
        assert top(module) in {"torch", "triton", "kernels"} or top(module) in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.cu*")), ids=lambda path: path.name)
def test_cuda_files_include_no_torch_header(path):
    included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
    assert included
    assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/", "caffe2/"))]


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cpu").glob("*_kernel.h")), ids=lambda path: path.name)
def test_nothing_foreign_is_compiled_for_one_instruction_set(path):
    todo, seen = [f'"cpu/{path.name}"'], set()
    while todo:  # kernels, the headers that they include, and what those include
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.startswith('"'):
            todo += re.findall(r"#include\s*([<\"][^>\"]+[>\"])", (ROOT / "csrc" / name.strip('"')).read_text())
    assert {name for name in seen if name.startswith("<")} <= {"<cstdint>", "<cstring>"}


def test_import_of_kernels_is_left_to_others():
    """A root conftest.py or tests/__init__.py would put the root on sys.path, where `import kernels` finds ours."""
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def public_objects() -> Iterator[tuple[str, object]]:
    """Everything users import: the names of asvit_fast and asvit_fast.ops, and the public methods of their classes."""
    for module in (importlib.import_module("asvit_fast"), importlib.import_module("asvit_fast.ops")):
        for name, value in ((name, getattr(module, name)) for name in dir(module)):
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("asvit_fast"):
                continue
            yield f"{module.__name__}.{name}", value
            if isinstance(value, type):
                methods = {key: method for key, method in vars(value).items() if not key.startswith("_")}
                yield from ((f"{name}.{key}", method) for key, method in methods.items() if inspect.isfunction(method))


def test_public_functions_and_classes_have_docstrings():
    objects = dict(public_objects())
    assert objects
    undocumented = [name for name, value in objects.items() if not inspect.getdoc(value)]
    assert [name for name in undocumented if name.split(".")[-1] not in CONTRACT] == []


@pytest.mark.parametrize("path", python_files("kernels"), ids=lambda path: path.name)
def test_kernels_have_docstrings(path):
    definitions = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    assert [node.name for node in definitions if node.name[0] != "_" and ast.get_docstring(node) is None] == []


def test_files_are_not_too_long():
    sources = [*FILES, *python_files("kernels"), *python_files("tests"), *(ROOT / "csrc").rglob("*.*")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines > MAXIMUM_LINES} == {}


def test_import_needs_neither_triton_nor_extension():
    hide = "import sys; sys.modules['triton'] = None; sys.modules['asvit_fast._C'] = None"
    program = f"{hide}; import asvit_fast; [getattr(asvit_fast, name) for name in dir(asvit_fast)]; print('imported')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "imported", result.stderr


def test_version_is_stated_once():
    asvit_fast = importlib.import_module("asvit_fast")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "asvit_fast._version.__version__"}
    assert metadata.version("asvit-fast") == asvit_fast.__version__


@pytest.mark.parametrize("order", list(itertools.permutations(("asvit_fast", "torch", "timm"))))
def test_ops_and_networks_are_registered_in_any_order_of_imports(order: tuple[str, ...]):
    program = (
        f"import {', '.join(order)}; print(timm.is_model('asvit_small'), torch.ops.asvit_fast.linear.default,"
        " type(torch.__spec__.loader).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["True", "asvit_fast.linear.default", "SourceFileLoader"], result.stderr


def test_functions_keep_their_names_when_modules_of_the_same_name_are_imported():
    program = (
        "import asvit_fast; from asvit_fast.search import Policy; import asvit_fast.acceleration;"
        " print('torch' in sys.modules, callable(asvit_fast.search), callable(asvit_fast.accelerate))"
    )
    program = "import sys, asvit_fast; print('torch' in sys.modules);" + program
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["False", "True", "True", "True"], result.stderr
