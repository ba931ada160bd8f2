"""Mask R-CNN with Swin-T: our backbone, as it is and accelerated, against torchvision's detector around timm's network
as people write it; and As-ViT Small. Inference at 800 x 1333 pixels, a training step at 320 x 320, peak memory.

    python benchmarks/bench_detection_speed.py [--rounds 5] [--csv FILE]

The detectors take turns in one process, on the same weights where they are the same network, and their boxes are
compared first.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import asvit_fast as af
from asvit_fast.bench.timer import compare, machine
from asvit_fast.cost import peak_allocation
from asvit_fast.files import write_atomic

SWIN = "swin_tiny_patch4_window7_224"
CLASSES = 91
TEST_SIDES, TRAIN_SIDE = (800, 1333), 320  # pixels
CPU = torch.device("cpu")


class SwinWithFPN(nn.Module):
    """As people write it: timm's features, permuted, into torchvision's pyramid."""

    out_channels = 256

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(SWIN, features_only=True, strict_img_size=False, always_partition=True)
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [one.permute(0, 3, 1, 2) for one in self.body(x)]
        return self.fpn(OrderedDict((str(index), one) for index, one in enumerate(maps)))


def detectors(side: int, longest: int) -> dict[str, nn.Module]:
    sizes = {"min_size": side, "max_size": longest}
    torch.manual_seed(0)
    peer = MaskRCNN(SwinWithFPN(), CLASSES, **sizes)
    ours = af.detection.mask_rcnn(af.detection.backbone(SWIN, norm=False), CLASSES, **sizes)
    ours.load_state_dict(renamed(peer.state_dict(), ours.state_dict()))
    accelerated = copy.deepcopy(ours)
    print(af.accelerate(accelerated))
    small = af.detection.mask_rcnn(af.detection.backbone("asvit_small"), CLASSES, **sizes)
    return {
        "torchvision, timm's Swin-T": peer,
        "ours, Swin-T": ours,
        "ours, Swin-T, accelerate": accelerated,
        "ours, As-ViT Small": small,
    }


def renamed(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's feature extraction calls layers.0 layers_0."""
    flat = {name.replace(".", "_"): name for name in ours}
    return {flat[name.replace(".", "_")]: value for name, value in theirs.items()}


def check(networks: dict[str, nn.Module], images: list[Tensor]) -> None:
    """Raise AssertionError unless the three with Swin find the same boxes."""
    with torch.inference_mode():
        peer, *others = (network.eval()(images)[0] for network in list(networks.values())[:3])
    for other in others:
        torch.testing.assert_close(other["boxes"], peer["boxes"], rtol=1e-3, atol=0.05)


def inference(network: nn.Module, images: list[Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return network(images)

    network.eval()
    return run


def training_step(network: nn.Module, images: list[Tensor]) -> Callable[[], Any]:
    side = images[0].shape[1]
    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 30, 150, 200], [100, 50, 300, 280]])
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in images]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    network.train()

    def run() -> None:
        torch.manual_seed(0)  # the same proposals are sampled each time
        optimizer.zero_grad()
        sum(network(images, targets).values()).backward()
        optimizer.step()

    return run


def measure(
    kind: str, networks: dict[str, nn.Module], make: Callable[..., Any], images: list[Tensor], rounds: int
) -> Any:
    runs = {name: make(network, images) for name, network in networks.items()}
    times = compare(runs, CPU, rounds, minimum_seconds=0)
    memory = {name: peak_allocation(run, CPU) for name, run in runs.items()}
    peer = next(iter(times.values())).median
    for name, timing in times.items():
        yield {
            "work": kind, "detector": name, "seconds": round(timing.median, 4),
            "lower_quartile": round(timing.lower_quartile, 4), "upper_quartile": round(timing.upper_quartile, 4),
            "speed_up": round(peer / timing.median, 3), "peak_mib": round(memory[name] / 2**20),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    networks = detectors(*TEST_SIDES)
    test = [torch.rand(3, *TEST_SIDES)]
    check(networks, test)
    rows = list(measure("inference", networks, inference, test, arguments.rounds))
    step = [torch.rand(3, TRAIN_SIDE, TRAIN_SIDE)] * 2
    networks = detectors(TRAIN_SIDE, TRAIN_SIDE)
    rows += measure("training step", networks, training_step, step, arguments.rounds)
    facts = machine(CPU)
    rows = [{**row, **facts} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    print(text.getvalue())
    if arguments.csv:
        write_atomic(arguments.csv, text.getvalue())


if __name__ == "__main__":
    main()
