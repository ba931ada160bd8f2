"""Training under torchrun: DistributedDataParallel and FSDP2 learn what one process learns, and survive a dead rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_program import PLAIN, grad_norms, run

from asvit_fast import processes
from asvit_fast.training.batch_size import least_of_ranks
from asvit_fast.training.checkpoint import LAST

TESTS = Path(__file__).parent
HALF = {"batch_size": 4}  # on each of two ranks


def torchrun(out: Path, options: dict[str, Any], *arguments: str, restarts: int = 0) -> list[dict[str, Any]]:
    """The rows of a training on two ranks."""
    return torchrun_output(out, options, *arguments, restarts=restarts)[-1]


def torchrun_output(out: Path, options: dict[str, Any], *arguments: str, restarts: int = 0) -> list[Any]:
    """Norms of its gradients, and its rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(TESTS / "training_program.py"), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--options", json.dumps(options), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-2:]]


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / LAST, weights_only=True)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("state_dict", "state_dict_ema"):
        for name, value in expected[key].items():
            torch.testing.assert_close(found[key][name], value, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: n + m)
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a single process."""
    out = tmp_path_factory.mktemp("alone")
    run(out, **PLAIN)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "ddp"},
        pytest.param({"parallel": "fsdp"}, marks=pytest.mark.slow),
        pytest.param({"parallel": "ddp", "batch_size": 2, "grad_accum_steps": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"parallel": "fsdp", "batch_size": 2, "grad_accum_steps": 2, "clip_grad": 100.0}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_two_processes_learn_what_one_does(tmp_path: Path, alone: Path, options: dict[str, Any]) -> None:
    """The same images in the same updates; sums over ranks round differently."""
    norms, rows = torchrun_output(tmp_path / "run", {**PLAIN, **HALF, **options})
    expected = [json.loads(line) for line in (alone / "trace.jsonl").read_text().splitlines()]
    for row, one in zip(rows, expected, strict=True):
        assert row["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
        assert row["top1"] == pytest.approx(one["top1"], abs=7) and row["token_reduction"] == one["token_reduction"]
    assert_close(checkpoint(tmp_path / "run"), checkpoint(alone))
    if "clip_grad" in options:  # of all shards
        expected = grad_norms()
        run(None, **PLAIN, clip_grad=options["clip_grad"])
        assert len(norms) == 18 and norms == pytest.approx(expected, rel=2e-3)


def test_ranks_agree_on_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measures what fits its own memory."""
    monkeypatch.setattr(processes, "gather", lambda sizes: [sizes, {4: 8, 2: 2, 1: 4}])
    assert least_of_ranks({4: 4, 2: 4, 1: 4}) == {4: 4, 2: 2, 1: 4}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.slow
def test_a_dead_rank_is_restarted_to_the_same_bits(tmp_path: Path, parallel: str) -> None:
    """SIGKILL of rank 1 in the middle of an epoch; torchrun starts all anew, and they go on from the checkpoint."""
    options = {**HALF, "parallel": parallel}
    torchrun(tmp_path / "whole", options)
    torchrun(tmp_path / "died", options, "--die-at", "9", "--die-rank", "1", restarts=1)
    assert (tmp_path / "died.died").exists()
    whole, died = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "died")
    for name, value in whole["state_dict"].items():
        assert torch.equal(died["state_dict"][name], value), name
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(died["optimizer"]["state"][index][key], value) for key, value in state.items())


@pytest.mark.slow
def test_shards_of_two_go_on_in_one(tmp_path: Path, alone: Path) -> None:
    """A checkpoint holds whole tensors: another number of processes continues it, with a word about the bits."""
    options = {**PLAIN, **HALF, "parallel": "fsdp"}
    with pytest.raises(AssertionError):  # torchrun gives up: nobody is restarted
        torchrun(tmp_path / "run", options, "--die-at", "9", "--die-rank", "1")
    with pytest.warns(UserWarning, match="not to the same bits"):
        run(tmp_path / "run", **PLAIN)
    assert_close(checkpoint(tmp_path / "run"), checkpoint(alone))
