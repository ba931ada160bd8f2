"""The same seed gives the same bits with any number of threads, in any process, and costs the caller no randomness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "score_program.py"


def scores(omp_threads: int, threads: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(omp_threads),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, PROGRAM, str(threads)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_scores_have_the_same_bits() -> None:
    alone, two, set_to_three = scores(1, 0), scores(2, 0), scores(1, 3)
    assert [alone["threads"], two["threads"], set_to_three["threads"]] == [1, 2, 3]
    assert alone["values"] == two["values"] == set_to_three["values"]
    assert alone["unchanged"] and two["unchanged"] and set_to_three["unchanged"]
    assert len(set(alone["values"]["convolutional"]["length_distortion"])) == 6  # networks of their own
