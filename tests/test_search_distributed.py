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


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts)]
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


@pytest.mark.slow
def test_real_scores_on_two_processes_equal_one(tmp_path: Path) -> None:
    program = str(TESTS / "search_program.py")
    one = alone(program, "real", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = torchrun(program, "real", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    (expected,) = results_of(one.stdout)
    assert results_of(two.stdout) == [expected, expected]
    assert len({tuple(pair) for pair in expected["measured"]}) == 3


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    done = torchrun(str(TESTS / "search_program.py"), "scale", str(tmp_path), "--fail-on-rank", str(rank))
    assert done.returncode != 0
    assert "the scorer is broken here" in done.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("kind", "rank"), [("search", 0), pytest.param("scale", 1, marks=pytest.mark.slow)])
def test_torchrun_restarts_after_a_kill(tmp_path: Path, kind: str, rank: int) -> None:
    """One process is killed, torchrun starts all of them again, and the result is that of an undisturbed one."""
    killed = tmp_path / "killed"
    program = (str(TESTS / "search_program.py"), kind, str(tmp_path / "run"), "--kill-once", f"{rank}:6:{killed}")
    done = torchrun(*program, restarts=1)
    assert done.returncode == 0, done.stderr
    assert killed.exists()
    expected = json.loads(json.dumps(RUN[kind](None, measures)))
    assert results_of(done.stdout) == [expected, expected]


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """As with ``--nnodes 1:2``: one process until it is killed, then two until one of them is, then one again."""
    program, run = str(TESTS / "search_program.py"), str(tmp_path / "run")
    for number, start in enumerate((alone, torchrun)):
        done = start(program, "search", run, "--kill-once", f"0:5:{tmp_path / str(number)}")
        assert done.returncode != 0 and (tmp_path / str(number)).exists(), done.stderr
    expected = RUN["search"](None, measures)
    assert RUN["search"](run, measures) == expected


def alone(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
