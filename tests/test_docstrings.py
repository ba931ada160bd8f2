"""Every public object has an example in its docstring, and it gives what it says."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from test_structure import public_objects

OBJECTS = {name: value for name, value in public_objects() if name.startswith("asvit_fast.")}


@pytest.mark.parametrize("name", OBJECTS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(OBJECTS[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples, f"{name} has no example"
    told: list[str] = []
    torch.manual_seed(0)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert not told, "".join(told)
