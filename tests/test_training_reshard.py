"""A training goes on with other processes, other passes, after SIGTERM: the same images in the same updates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_program import OPTIONS, PLAIN, Pictures, run

from asvit_fast.errors import InputError
from asvit_fast.training.checkpoint import LAST

TESTS = Path(__file__).parent
PROGRAM = str(TESTS / "training_program.py")
TWELVE = {**PLAIN, "epochs": 2, "schedule": "1:2,1:1", "checkpoint_interval": 1}  # images an update, of 48


def start(processes: int, out: Path, options: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(ranks if processes > 1 else []), PROGRAM, str(out), "--options", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]


def entry(out: Path) -> dict[str, Any]:
    return torch.load(out / LAST, weights_only=True)["asvit_fast"]


def assert_same_curve(found: Path, expected: Path) -> None:
    """Sums over ranks round differently, no more: an image too many or too few would show."""
    assert [row["epoch"] for row in rows(found)] == [row["epoch"] for row in rows(expected)]
    for row, one in zip(rows(found), rows(expected), strict=True):
        assert row["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    ours, theirs = (torch.load(out / LAST, weights_only=True)["state_dict"] for out in (found, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    run(out, **TWELVE, batch_size=12)
    return out


def test_three_processes_then_one_then_two(tmp_path: Path, whole: Path) -> None:
    """Of four updates an epoch the first two run on three processes, the third on one, the next two on two."""
    for processes, update in ((3, 2), (1, 3), (2, 5), (1, None)):
        options = {**TWELVE, "batch_size": 12 // processes}
        code, errors = finish(start(processes, tmp_path, options, *([] if update is None else ["--die-at", str(update)])))
        assert (code != 0) == (update is not None), errors
        if update is not None:
            assert entry(tmp_path)["position"]["update"] == update % 4
            assert len(entry(tmp_path)["losses"]) == processes
    assert_same_curve(tmp_path, whole)
