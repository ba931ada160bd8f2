"""Scores on a GPU that is not there: what five networks of a topology ask of it; see test_stacked_scores.py.

Argument: a topology. Prints a line of JSON: {pass: {"launches", "allocations", "syncs", "transfers"}}. The passes are
those of ``score`` with some metrics, "one by one" or "stacked", and the function alone that a CUDA graph captures.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import fake_cuda
import torch
from launch_counter import LaunchCounter

import asvit_fast as af
import asvit_fast.scoring.score
from asvit_fast.backends import FallbackWarning
from asvit_fast.scoring import ScoreSettings, cuda_graphs, draws, stacked_weights
from asvit_fast.topology import Topology

score = sys.modules["asvit_fast.scoring.score"]
REPEATS = 5
GPU = torch.device("cuda", 0)


def blank_network(topology: Topology, settings: ScoreSettings) -> torch.nn.Module:
    """As ``draws.blank_network``: fake tensors cannot be moved from one device to another."""
    return af.create_model(topology, img_size=settings.img_size, num_classes=0, weight_init="skip").eval()


def draw(topology: Topology, repeat: int, settings: ScoreSettings, seed: Any) -> torch.nn.Module:
    return fake_cuda.to_fake_gpu(blank_network(topology, settings))


class Captured(cuda_graphs.GraphCache):
    """Counts what a graph would hold."""

    counted: LaunchCounter

    def run(self, kind: str, key: Any, function: Any, inputs: Any, device: torch.device) -> torch.Tensor:
        def count(*inputs: torch.Tensor) -> torch.Tensor:
            with LaunchCounter() as self.counted:
                return function(*inputs)

        return super().run(kind, key, count, inputs, device)


def main() -> None:
    fake_cuda.install()
    warnings.simplefilter("error", FallbackWarning)
    score.draw, stacked_weights.blank_network = draw, blank_network
    topology, counts = Topology.parse(sys.argv[1]), {}
    for metrics in (("length_distortion",), ("length_distortion", "curvature"), ("ntk_condition",)):
        settings = ScoreSettings(metrics, device="cuda", repeats=REPEATS)
        for way in ("one by one", "stacked"):
            score.stacks_networks = lambda device, way=way: way == "stacked"
            graphs = sys.modules["asvit_fast.scoring.stacked_score"].GRAPHS = Captured()
            with fake_cuda.fake_tensors(), LaunchCounter(numbers=True) as counter:
                score.score_networks([(topology, repeat, 0) for repeat in range(REPEATS)], settings, None, GPU)
            counts[f"{'+'.join(metrics)}, {way}"] = counter.totals()
            if way == "stacked":
                counts[f"{'+'.join(metrics)}, captured"] = graphs.counted.totals()
            draws.circle_of.cache_clear()
            print(f"{metrics} {way}: {dict(counter.launches)} {dict(counter.transfers)}", file=sys.stderr)
    print(json.dumps(counts), flush=True)
    os._exit(0)  # autograd's thread of the GPU does not end in order


if __name__ == "__main__":
    main()
