"""Scores of random topologies, with which ``af.score`` compares: asvit_fast/scoring/random_topologies.json.

    python benchmarks/score_sample.py 64:200 224:60

Each argument is an image size in pixels and a number of topologies. What the file has of them already is kept.
"""

from __future__ import annotations

import argparse
from typing import Any

from asvit_fast.files import read_object, to_json, write_atomic
from asvit_fast.scoring import score
from asvit_fast.scoring.draws import stream
from asvit_fast.scoring.percentile import SAMPLE
from asvit_fast.settings import METRICS
from asvit_fast.topology import SearchSpace

REPEATS = 2
SEED = 2202


def add_scores(content: dict[str, Any], img_size: int, count: int) -> None:
    """Score topologies until there are so many of this size, in the order of drawing."""
    size = f"{img_size}x{img_size}"
    empty = {"repeats": REPEATS, "seed": SEED, "scores": {metric: [] for metric in METRICS}}
    scores = content.setdefault(size, empty)["scores"]
    done = len(scores[METRICS[0]])
    generator, space = stream(SEED), SearchSpace()
    for number in range(count):
        topology = space.sample(generator)
        if number < done:
            continue
        result = score(topology, METRICS, img_size, repeats=REPEATS, seed=SEED + number, device="cpu")
        for metric in METRICS:
            scores[metric].append(float(f"{result[metric].mean:.6g}"))
        write_atomic(SAMPLE, to_json(content) + "\n")
        print(f"{img_size} pixels: {number + 1} of {count}", flush=True)


def main() -> None:
    """Score and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", metavar="PIXELS:TOPOLOGIES")
    content = read_object(SAMPLE)
    for argument in parser.parse_args().sizes:
        img_size, count = map(int, argument.split(":"))
        add_scores(content, img_size, count)


if __name__ == "__main__":
    main()
