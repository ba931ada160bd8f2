"""benchmarks/gpu_session.sh without a GPU, its summary, and what becomes of GPU tests that would be skipped."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = "benchmarks/gpu_session.sh"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def session(root: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = ["bash", SCRIPT, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
@pytest.mark.slow
def test_dry_run(root: Path, tmp_path: Path, step: int) -> None:
    """Every program that the step starts runs on the CPU; its results are few files, and the end says so."""
    done = session(root, tmp_path, str(step), "--dry-run")
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"STEP {step}: passed, ")
    assert len(list(tmp_path.iterdir())) <= 8
    with open(tmp_path / "parts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 4 and {row["step"] for row in rows} == {str(step)}
    assert {row["verdict"] for row in rows} == {"passed"} and all(torch.__version__ in row["facts"] for row in rows)


def test_usage(root: Path, tmp_path: Path) -> None:
    """Words that it does not know start nothing."""
    for arguments in ([], ["7"], ["1", "--dry"]):
        done = session(root, tmp_path / "none", *arguments)
        assert done.returncode == 2 and "all|STEP..." in done.stdout
    assert not (tmp_path / "none").exists()


def test_a_failure_is_said(root: Path, tmp_path: Path) -> None:
    """An interpreter without torch: each part fails with its reason, none is left out, and the exit code tells."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", SCRIPT, "6", "--dry-run"], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout.count("failed: exit code 3") == 5
    assert "no torch here" in done.stdout and done.stdout.splitlines()[-1].startswith("STEP 6: failed, ")


def test_summary(root: Path, tmp_path: Path) -> None:
    """Ours against the best of the others, called and replayed; what was not right is named."""
    rows = [
        "case,mode,provider,milliseconds,replay_milliseconds",
        "a,forward,ours,2.0,0.5", "a,forward,eager,8.0,2.0", "a,forward,SDPA,4.0,3.0", "b,forward,ours,1.0,",
    ]  # fmt: skip
    (tmp_path / "ops.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "nets.csv").write_text("network,provider,milliseconds,status\nswin,ours,,wrong\nswin,source,3.0,ok\n")
    files = [str(tmp_path / name) for name in ("ops.csv", "nets.csv", "none.csv")]
    command = [sys.executable, "benchmarks/gpu_summary.py", *files]
    lines = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert " ".join(lines[1].split()) == "a, forward 2.0000 4.0000 2.00x SDPA | 0.5000 2.0000 4.00x eager"
    assert lines[2].split() == ["b,", "forward", "1.0000", "alone"]
    assert lines[3].split() == ["swin", "ours", "wrong"] and lines[4] == "none.csv: nothing was measured"


# --------------------------------------------------------------------------- tests of the GPU

TESTS = """
import pytest
pytestmark = pytest.mark.gpu

def test_nothing(): pass
def test_rehearsed(gpu): assert gpu.type == "cpu"
def test_memory(gpu): pytest.skip("not enough memory: 3 GiB are free")
def test_excuse(gpu): pytest.skip("no mood")
"""


@pytest.mark.slow
@NO_GPU
def test_required_and_rehearsed(root: Path, tmp_path: Path) -> None:
    """Skipped; failed where a GPU is required, but for the reasons that may be; run on the CPU in a rehearsal."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_no_module.py").write_text("import pytest\npytest.skip('nothing here', allow_module_level=True)\n"
                                                "@pytest.mark.gpu\ndef test(): pass\n")  # fmt: skip
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")

    def outcome(**settings: str) -> str:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("ASVIT_FAST_RE")}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            ".",
        ]
        environment = {**plain, "PYTHONPATH": str(root), **settings}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[-1].rpartition(" in ")[0]

    assert outcome() == "5 skipped"
    assert outcome(ASVIT_FAST_REQUIRE_GPU="1") == "5 errors"
    assert outcome(ASVIT_FAST_REHEARSE="1") == "1 passed, 4 skipped"
    assert outcome(ASVIT_FAST_REHEARSE="1", ASVIT_FAST_REQUIRE_GPU="1") == "1 failed, 1 passed, 1 skipped, 2 errors"


LOST = """
import pytest
pytestmark = pytest.mark.gpu

def test_stray(gpu): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_other(gpu): pass
"""


@NO_GPU
def test_a_lost_gpu_ends_its_process(root: Path, tmp_path: Path) -> None:
    """A worker of xdist: the others' tests go on. Without xdist all of them end there."""
    (tmp_path / "test_it.py").write_text(LOST)
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    environment = {**os.environ, "PYTHONPATH": str(root), "ASVIT_FAST_REHEARSE": "1"}
    for workers, expected in (["-n", "1"], "1 failed, 1 passed"), ([], "illegal memory access"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "."]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and expected in done.stdout.splitlines()[-1], done.stdout
