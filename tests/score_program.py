"""Scores of topologies, timm names and modules in a process of its own: ``python score_program.py THREADS``.

Prints one JSON object: every value to the bit, and whether the random numbers of the caller were left alone.
"""

from __future__ import annotations

import json
import random
import sys
import warnings

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asvit_fast as af

warnings.simplefilter("ignore")


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.convolution(x)), 0.5, training=True).flatten(1)
        return self.classifier(x) + torch.rand(1)


def main() -> None:
    threads = int(sys.argv[1])
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    modules = {
        "noisy": Noisy(),
        "wide": nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 700), nn.Tanh(), nn.Linear(700, 300)),
    }
    modules["convolutions"] = timm.create_model("mobilenetv3_small_050", num_classes=0)
    torch.manual_seed(4)
    random.seed(4)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    scores = {
        "topology": af.score("8,2,3|4,1,2|4,1,4|4,1,6|32", img_size=64, repeats=3, thetas=3, batch=4),
        "one repeat": af.score("8,2,3|4,1,2|4,1,4|4,1,6|32", ("length_distortion",), img_size=64, repeats=1),
        "convolutional": af.score("resnet10t", ("length_distortion",), img_size=32, repeats=6, thetas=2, seed=1),
        "transformer": af.score("vit_tiny_patch16_224", img_size=32, repeats=3, thetas=2, batch=2),
        "ours by name": af.score("asvit_seed", ("curvature",), img_size=32, repeats=3, thetas=2),
        **{
            name: af.score(module, img_size=32 if name == "noisy" else 64, repeats=3, thetas=5, batch=5)
            for name, module in modules.items()
        },
    }
    after = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    values = {name: {m: [v.hex() for v in s[m].values] for m in s} for name, s in scores.items()}
    unchanged = torch.equal(before[0], after[0]) and before[1:] == after[1:]
    print(json.dumps({"values": values, "unchanged": unchanged, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
