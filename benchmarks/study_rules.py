"""Searches and growths by every rule and ten seeds, with cheap scores at 64 pixels (As-ViT, Figures 3, 5, Tables 3, 7).

    python benchmarks/study_rules.py scale build/rules/scale --seeds 10
    python benchmarks/study_rules.py search build/rules/search --seeds 10 --steps 200
    asvit-fast report build/rules/scale

A run that is there is continued, or left when it is finished.
"""

from __future__ import annotations

import argparse
import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from asvit_fast.search import scale, search
from asvit_fast.settings import SCALE_RULES, SEARCH_RULES

IMG_SIZE = 64  # pixels
WIDTH = 16  # channels of stage 1 of searched networks, and at the start of a growth
START = f"8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,{WIDTH}"  # the paper's seed topology
SCORES: dict[str, Any] = {"img_size": IMG_SIZE, "repeats": 1, "device": "cpu", "progress": False}


def run(task: tuple[str, int], arguments: argparse.Namespace) -> Path:
    """One search or growth by a rule with a seed."""
    rule, seed = task
    torch.set_num_threads(1)
    out = arguments.out / f"{rule}-{seed}"
    if arguments.kind == "scale":
        scale(START, max_params=arguments.max_params, rule=rule, seed=seed, out=out, **SCORES)
    else:
        search(steps=arguments.steps, width=WIDTH, rule=rule, seed=seed, out=out, **SCORES)
    return out


def main() -> None:
    """Run them, seed by seed so that all rules have equally many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("scale", "search"))
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="topologies that a search scores")
    parser.add_argument("--max-params", type=float, default=2e6, help="limit of a growth")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    arguments = parser.parse_args()
    rules = SCALE_RULES if arguments.kind == "scale" else SEARCH_RULES
    tasks = [(rule, seed) for seed in range(arguments.seeds) for rule in rules]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for out in pool.map(functools.partial(run, arguments=arguments), tasks):
            print(out, flush=True)


if __name__ == "__main__":
    main()
