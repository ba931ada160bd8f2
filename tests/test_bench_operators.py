"""The benchmarks of operators and networks: they run, check before they time, and write rows."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asvit_fast.cost import peak_allocation

QUICK = ["--device", "cpu", "--rounds", "2", "--no-compile", "--threads", "1"]


@pytest.fixture
def operators(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("operators")


def rows_of(root: Path, tmp_path: Path, script: str, *arguments: str) -> list[dict[str, str]]:
    table = tmp_path / "rows.csv"
    command = [sys.executable, str(root / "benchmarks" / script), *QUICK, *arguments, "--csv", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    with table.open() as file:
        return list(csv.DictReader(file))


def test_window_attention(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, tmp_path, "bench_window_attention.py", "--case", "one window")
    assert {row["mode"] for row in rows} == {"forward", "backward", "both"}
    assert {"ours", "eager", "SDPA, default"} <= {row["provider"] for row in rows}
    assert all(float(row["milliseconds"]) > 0 and float(row["peak_mebibytes"]) > 0 for row in rows)
    assert all(float(row["error"]) < 1e-5 for row in rows)


def test_a_wrong_provider_is_not_timed(operators, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer is left out with a word; if ours is wrong, nothing is timed."""
    x = torch.randn(3, 4, requires_grad=True)
    work = operators.Work("double", (x,), lambda x: 2 * x, x.numel() * 8, x.numel(), "number")
    right, wrong = (lambda x: 2 * x), (lambda x: x + x.detach())  # right values, wrong gradients
    rows = operators.measure("test", work, {"ours": right, "wrong": wrong}, ["forward", "backward"], 2, 1e-5)
    timed = [(row.mode, row.provider) for row in rows]
    assert timed == [("forward", "ours"), ("forward", "wrong"), ("backward", "ours")]
    assert "double, backward: left out, wrong by more than 1e-05: {'wrong': " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"backward: wrong results, nothing timed: \{'ours'"):
        operators.measure("test", work, {"ours": wrong, "peer": right}, ["forward", "backward"], 2, 1e-5)


def test_a_provider_that_refuses_is_left_out(operators, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not for this shape")

    x = torch.randn(3, 4, requires_grad=True)
    work = operators.Work("double", (x,), lambda x: 2 * x, x.numel() * 8, x.numel(), "number")
    rows = operators.measure("test", work, {"ours": lambda x: 2 * x, "peer": refuse}, ["both"], 2, 1e-5)
    assert [row.provider for row in rows] == ["ours"]
    assert "peer left out, not for this shape" in capsys.readouterr().out


def test_peak_memory() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(2**18)  # 1 MiB
        second = torch.empty(2**19)  # 2 MiB
        del first
        return second + 1

    assert peak_allocation(run, torch.device("cpu")) == pytest.approx(4 * 2**20, rel=0.01)


def test_peak_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a type that oneDNN has no instructions for on this processor."""
    from asvit_fast.bench import rooflines

    def refuse(*arguments: object) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    a = torch.ones(4, 4)
    assert [name for name, _ in rooflines._products(a, a) if name != "our kernel"] == ["torch.mm"]
