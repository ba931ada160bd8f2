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


def results_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("kind", ["search", "scale"])
def test_two_processes_equal_one(tmp_path: Path, kind: str) -> None:
    done = torchrun(str(TESTS / "search_program.py"), kind, str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = json.loads(json.dumps(RUN[kind](None, measures)))
    assert results_of(done.stdout) == [expected, expected]
    assert json.loads((tmp_path / "result.json").read_text())["topology"] == expected["topology"]


def test_real_scores_on_two_processes_equal_one(tmp_path: Path) -> None:
    program = str(TESTS / "search_program.py")
    command = [sys.executable, program, "real", str(tmp_path / "one")]
    one = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    two = torchrun(program, "real", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    (expected,) = results_of(one.stdout)
    assert results_of(two.stdout) == [expected, expected]
    assert len({tuple(pair) for pair in expected["measured"]}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    done = torchrun(str(TESTS / "search_program.py"), "scale", str(tmp_path), "--fail-on-rank", str(rank))
    assert done.returncode != 0
    assert "the scorer is broken here" in done.stderr
    assert not (tmp_path / "result.json").exists()
