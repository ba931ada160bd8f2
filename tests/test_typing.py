"""What type checkers tell users of the public API: nothing about a program that is right, the line of each mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("typed_program.py")
MISTAKES = {  # what is right in the program, and what a user might write
    '"40:4,30:2,230:1"': "40",
    "max_params=5e6": 'max_params="many"',
    "2, (7, 7)": '"2", (7, 7)',
    "af.Budget(params=(None, 2e6))": "3",
    "[-1].topology": "[-1].topolgy",
    "return result.top1": "return result.best",
}


def wrong_program(folder: Path) -> tuple[Path, list[int]]:
    """The program with all the mistakes, and their lines."""
    lines = PROGRAM.read_text().splitlines()
    found = []
    for right, wrong in MISTAKES.items():
        (number,) = [number for number, line in enumerate(lines) if right in line]
        lines[number] = lines[number].replace(right, wrong)
        found.append(number + 1)
    (folder / "wrong_program.py").write_text("\n".join(lines) + "\n")
    return folder / "wrong_program.py", sorted(found)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy(tmp_path: Path, root: Path) -> None:
    """As strict as it can be, and silent about modules that are not the user's, as it is of installed packages."""
    wrong, lines = wrong_program(tmp_path)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    command += ["--config-file", tmp_path / "mypy.ini"]
    environment = {**os.environ, "MYPYPATH": str(root)}
    right = subprocess.run([*command, PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert right.returncode == 0, right.stdout
    result = subprocess.run([*command, wrong], cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = [int(line.split(":")[1]) for line in result.stdout.splitlines() if ": error: " in line]
    assert sorted(set(told)) == lines, result.stdout


@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed")
def test_pyright(tmp_path: Path, root: Path) -> None:
    wrong, lines = wrong_program(tmp_path)
    (tmp_path / PROGRAM.name).write_text(PROGRAM.read_text())
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(root)], "include": ["*.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--project", tmp_path, "--pythonpath", sys.executable]
    result = subprocess.run([*command, "--outputjson"], cwd=tmp_path, capture_output=True, text=True)
    told = [
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1)
        for one in json.loads(result.stdout)["generalDiagnostics"]
        if one["severity"] == "error"
    ]
    assert sorted(set(told)) == [(wrong.name, line) for line in lines], result.stdout
