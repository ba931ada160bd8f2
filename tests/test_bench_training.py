"""The benchmark of training steps runs on a CPU, checks before it times, and writes rows."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from stacked import needs_extension


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("bench_training")


def rows_of(script, monkeypatch: pytest.MonkeyPatch, path: Path) -> list[dict[str, str]]:
    options = ["--device", "cpu", "--tiny", "--no-compile", "--dtype", "float32", "--rounds", "2", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *options])
    script.main()
    with path.open() as file:
        return list(csv.DictReader(file))


@needs_extension
def test_rows(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(script, monkeypatch, tmp_path / "rows.csv")
    assert {row["provider"] for row in rows} == {"ours", "SDPA"}
    steps = [row for row in rows if row["reduction"] != "0"]
    assert [row["reduction"] for row in steps] == ["4", "4", "2", "2", "1", "1"]
    assert all(float(row["milliseconds"]) > 0 and float(row["error"]) < 1e-5 for row in steps)
    assert int(steps[0]["macs"]) < int(steps[2]["macs"]) < int(steps[4]["macs"])
    schedules = [row for row in rows if "table6" in row["case"]]
    assert len(schedules) == 6 and all(0 < float(row["flops_saved"]) < 1 for row in schedules)
    changes = [row for row in rows if "change of the phase" in row["case"]]
    assert len(changes) == 2 and all("0 recompilations" in row["note"] for row in changes)


@pytest.mark.slow
@needs_extension
def test_out_of_memory_is_a_row(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = script.Case._measure_steps

    def no_memory(*_: object) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("tried to allocate too much")

    def fail_with_full_tokens(self, table, exact, reduction: int) -> None:
        if reduction == 1:
            table["SDPA"].results = no_memory
        measure(self, table, exact, reduction)

    monkeypatch.setattr(script.Case, "_measure_steps", fail_with_full_tokens)
    rows = rows_of(script, monkeypatch, tmp_path / "rows.csv")
    (failed,) = [row for row in rows if "out of memory" in row["note"]]
    assert (failed["provider"], failed["reduction"], failed["milliseconds"]) == ("SDPA", "1", "nan")
    assert {row["provider"] for row in rows if "table6" in row["case"]} == {"ours"}


@needs_extension
def test_wrong_results_are_not_timed(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer_of = script.peer_of

    def wrong(model):
        peer = peer_of(model)
        with torch.no_grad():
            peer.patch_embed.proj.weight.mul_(1.1)
        return peer

    monkeypatch.setattr(script, "peer_of", wrong)
    with pytest.raises(SystemExit, match="wrong results, nothing timed"):
        rows_of(script, monkeypatch, tmp_path / "rows.csv")
