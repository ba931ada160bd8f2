"""torchrun shares the scoring and changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from search_program import RUN, measures

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("kind", RUN)
def test_two_processes_equal_one(tmp_path: Path, kind: str) -> None:
    done = torchrun(str(TESTS / "search_program.py"), kind, str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    expected = json.loads(json.dumps(RUN[kind](None, measures)))
    assert results == [expected, expected]
    assert json.loads((tmp_path / "result.json").read_text())["topology"] == expected["topology"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    done = torchrun(str(TESTS / "search_program.py"), "scale", str(tmp_path), "--fail-on-rank", str(rank))
    assert done.returncode != 0
    assert "the scorer is broken here" in done.stderr
    assert not (tmp_path / "result.json").exists()
