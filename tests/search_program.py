"""Searches and scaling runs that die on the way, for the kill and torchrun tests, in processes of their own.

    search_program.py KIND OUT [--fail-on-rank RANK] [--kill-once RANK:CALL:FILE]

prints the result as one JSON line on every rank.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asvit_fast import run_directory
from asvit_fast.errors import InputError
from asvit_fast.search import Budget, scale, search
from asvit_fast.topology import Topology

SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"


def measures(topology: Topology) -> dict[str, float]:
    """A pure function that prefers large kernels early and wide FFNs late; infinite for a few topologies."""
    length = sum(s.kernel / (i + 1) + i * s.expansion + 0.3 * s.depth for i, s in enumerate(topology.stages))
    ntk = 50 / length + sum(s.splits for s in topology.stages) + topology.heads / topology.width
    bad = sum(s.kernel * s.expansion for s in topology.stages) % 23 == 0
    return {"length_distortion": length * math.sqrt(topology.width), "ntk_condition": math.inf if bad else ntk}


class Scorer:
    def __init__(self, kill_at: int, sleep: float, fail_on_rank: int, once: Path | None = None) -> None:
        self.calls, self.kill_at, self.sleep, self.fail_on_rank = 0, kill_at, sleep, fail_on_rank
        self.once = once  # a file that remembers that the kill has happened

    def __call__(self, topology: Topology) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.kill_at and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if int(os.environ.get("RANK", 0)) == self.fail_on_rank:
            raise ValueError("the scorer is broken here")
        time.sleep(self.sleep)
        return measures(topology)


def run_search(out: str | None, scorer: object, steps: int = 30) -> dict:
    budget = Budget(params=(2_000_000, 3_000_000))
    result = search(steps=steps, out=out, scorer=scorer, budget=budget, seed=3, progress=False, device="cpu")
    policy = result.policy.logits.tolist()
    trace = [{key: value for key, value in record.items() if key != "seconds"} for record in result.trace]
    return {**result.to_dict(), "policy": policy, "trace": trace, "baseline": result.policy.baseline}


def run_scale(out: str | None, scorer: object) -> dict:
    steps = scale(SEED, max_params=20e6, out=out, scorer=scorer, seed=3, progress=False, device="cpu")
    records = [{key: value for key, value in step.to_dict().items() if key != "seconds"} for step in steps]
    return {"topology": str(steps[-1].topology), "trace": records}


def run_real(out: str | None, _: object) -> dict:
    """Both algorithms with the real scores, as small as they get."""
    options = {"img_size": 32, "repeats": 3, "thetas": 3, "batch": 3, "seed": 1, "device": "cpu", "progress": False}
    found = search(steps=3, out=out and f"{out}/search", **options)
    grown = scale(
        found.topology, max_params=6e6, max_steps=1, out=out and f"{out}/scale", convention="reference", **options
    )
    measured = [(record["length_distortion"], record["ntk_condition"]) for record in found.trace]
    return {**found.to_dict(), "measured": measured, "candidates": [c.to_dict() for c in grown[0].candidates]}


RUN = {"search": run_search, "scale": run_scale, "real": run_real}


def run_killed(kind: str, out: str, kill_at: int = 0, sleep: float = 0.0) -> None:
    """A run whose scorer kills the process at one of its calls, or takes so long that somebody else can."""
    RUN[kind](out, Scorer(kill_at, sleep, -1))


def run_killed_in_write(out: str, point: str, count: int) -> None:
    """A search killed at the ``count``-th write: after "append" (trace written, state not), after "write" (both
    written), or before "replace" (temporary file written, not yet in place)."""
    calls = {"append": 0, "write": 0, "replace": 0}

    def counted(name: str, function: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            last = name == point and calls[name] == count
            if last and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    run_directory.append_jsonl = counted("append", run_directory.append_jsonl, before=False)
    run_directory.write_atomic = counted("write", run_directory.write_atomic, before=False)
    os.replace = counted("replace", os.replace, before=True)
    run_search(out, measures)


def run_on_full_disk(out: str, message: str) -> None:
    """A search that may write 12,000 bytes into a file and no more; its error goes to the file ``message``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
    try:
        run_search(out, measures)
    except InputError as error:
        Path(message).write_text(str(error))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=RUN)
    parser.add_argument("out")
    parser.add_argument("--fail-on-rank", type=int, default=-1)
    parser.add_argument("--kill-once", default="", help="RANK:CALL:FILE; FILE remembers it over restarts")
    arguments = parser.parse_args()
    scorer = Scorer(0, 0.0, arguments.fail_on_rank)
    if arguments.kill_once:
        rank, call, marker = arguments.kill_once.split(":")
        here = rank == os.environ.get("RANK", "0")
        scorer = Scorer(int(call) if here else 0, 0.0, arguments.fail_on_rank, Path(marker))
    result = RUN[arguments.kind](arguments.out, scorer)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
