"""The scripts of examples/ run as they are, are short, and their notebooks are made from them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "make_notebooks.py")
NEEDS = {
    "accelerate_lightning": ("lightning",),
    "accelerate_transformers": ("transformers",),
    "deploy": ("torchao", "onnx", "onnxscript", "onnxruntime"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs(script: Path, tmp_path: Path) -> None:
    missing = [name for name in NEEDS.get(script.stem, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_is_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 80


def test_notebooks_are_made_from_the_scripts() -> None:
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("make_notebooks", EXAMPLES / "make_notebooks.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    notebooks = {path.stem: path.read_text() for path in (EXAMPLES / "notebooks").glob("*.ipynb")}
    assert notebooks == {script.stem: maker.notebook(script) for script in SCRIPTS}, "make notebooks"
