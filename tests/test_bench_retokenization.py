"""The benchmark of whole trainings: fixed data, runs that are done once, savings against the right run."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from stacked import needs_extension
from torch.utils.data import TensorDataset

import asvit_fast as af

TINY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("bench_retokenization")


def test_digits(script) -> None:
    module = importlib.import_module("digits")
    train, validation = module.digits(32)
    assert len(train) == 1442 and len(validation) == 355
    assert train.tensors[0].shape == (1442, 3, 32, 32) and train.tensors[0].dtype == torch.float32
    counts = train.tensors[1].bincount() / (train.tensors[1].bincount() + validation.tensors[1].bincount())
    assert counts.sub(0.8).abs().max() < 0.01  # each class has its share
    targets = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0])
    assert module.validation_mask(targets).nonzero().flatten().tolist() == [6]  # the fifth 0
    images = module.digits()[0].tensors[0]
    assert abs(images.mean().item()) < 1e-3 and abs(images.std().item() - 1) < 1e-3


def test_savings(script) -> None:
    def record(schedule: str, seed: int, seconds: float, flops_saved: float) -> dict[str, object]:
        same = dict.fromkeys(("model", "epochs", "recipe", "machine", "threads", "torch"), "x")
        return same | {
            "schedule": schedule, "seed": seed, "train_seconds": seconds, "flops_saved": flops_saved,
            "time_saved": "", "ratio": "",
        }  # fmt: skip

    records = [record("table6-40", 0, 90.0, 0.2), record("1", 1, 50.0, 0.0)]
    assert [row["ratio"] for row in script.with_savings(records)] == ["", ""]  # no run of this seed with full tokens
    found = script.with_savings([*records, record("1", 0, 100.0, 0.0)])
    assert [(row["time_saved"], row["ratio"]) for row in found] == [(0.1, 0.5), ("", ""), ("", "")]


@needs_extension
def test_runs_are_done_once(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, schedules = tmp_path / "rows.csv", ["1", "0.5:4,0.5:1"]
    few = tuple(TensorDataset(*(tensor[:256] for tensor in part.tensors)) for part in script.digits(64))
    monkeypatch.setattr(script, "digits", lambda: few)
    monkeypatch.setattr(script, "tune_allocator", lambda: True)  # for good, and for all tests

    def rows(*seeds: str) -> list[dict[str, str]]:
        options = ["--device", "cpu", "--model", TINY, "--epochs", "2", "--seeds", *seeds, "--schedules", *schedules]
        monkeypatch.setattr(sys, "argv", ["bench_retokenization.py", *options, "--csv", str(table)])
        script.main()
        with table.open() as file:
            return list(csv.DictReader(file))

    first = rows("0")
    assert [row["schedule"] for row in first] == schedules
    full, reduced = first
    assert full["ratio"] == "" and float(reduced["ratio"]) != 0
    assert reduced["phases"] == "1:4 1:1" and 0 < float(reduced["flops_saved"]) < 0.5
    assert int(reduced["flops"]) / int(full["flops"]) == pytest.approx(1 - float(reduced["flops_saved"]), abs=1e-4)
    more = rows("0", "1")
    assert more[:2] == first
    assert [(row["schedule"], row["seed"]) for row in more[2:]] == [("1", "1"), ("0.5:4,0.5:1", "1")]


def test_side_by_side_is_what_train_does(script, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(TensorDataset(*(tensor[:256] for tensor in part.tensors)) for part in script.digits(64))
    monkeypatch.setattr(script, "digits", lambda: few)
    cpu = torch.device("cpu")
    rows = script.run(TINY, ["1", "1:4,1:1"], 3, 2, cpu)
    for row, schedule in zip(rows, ("1", "1:4,1:1"), strict=True):
        options = {**script.RECIPE, "schedule": schedule, "epochs": 2, "seed": 3, "img_size": 64, "workers": 0}
        alone = af.train(TINY, few, device="cpu", progress=False, **options)
        assert (row.top1, row.ema_top1) == (round(alone.top1, 2), round(alone.epochs[-1]["ema_top1"], 2))
