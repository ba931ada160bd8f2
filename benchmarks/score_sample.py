"""Scores of random topologies, with which ``af.score`` compares: asvit_fast/scoring/random_topologies.json.

    python benchmarks/score_sample.py 64:200 224:60

Each argument is an image size in pixels and a number of topologies.
"""

from __future__ import annotations

import argparse

from asvit_fast.files import to_json, write_atomic
from asvit_fast.scoring import score
from asvit_fast.scoring.draws import stream
from asvit_fast.scoring.percentile import SAMPLE
from asvit_fast.settings import METRICS
from asvit_fast.topology import SearchSpace

REPEATS = 2
SEED = 2202


def scores_of(img_size: int, count: int) -> dict[str, list[float]]:
    """Ascending values of each metric."""
    generator, space = stream(SEED), SearchSpace()
    results = []
    for number in range(count):
        topology = space.sample(generator)
        results.append(score(topology, METRICS, img_size, repeats=REPEATS, seed=SEED + number, device="cpu"))
        print(f"{img_size} pixels: {number + 1} of {count}", flush=True)
    return {metric: sorted(float(f"{result[metric].mean:.6g}") for result in results) for metric in METRICS}


def main() -> None:
    """Score and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", metavar="PIXELS:TOPOLOGIES")
    content = {}
    for argument in parser.parse_args().sizes:
        img_size, count = map(int, argument.split(":"))
        content[f"{img_size}x{img_size}"] = {
            "topologies": count, "repeats": REPEATS, "seed": SEED, "scores": scores_of(img_size, count)
        }  # fmt: skip
    write_atomic(SAMPLE, to_json(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
