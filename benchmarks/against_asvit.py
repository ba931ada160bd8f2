"""Our scores against the authors' public code, on the same weights, images and circles, in one process.

    git clone https://github.com/VITA-Group/AsViT
    python benchmarks/against_asvit.py --reference AsViT

These are the rows "authors" of bench_scores.py. Runs of theirs and ours alternate. Every row carries the largest
relative difference between their number and ours; numbers that disagree end the program with exit code 1 and no time
is claimed for them.

Their code calls .cuda(); on the CPU those calls are replaced by the identity while it runs. Their length distortion
takes 2 x 256 backward passes, minutes per network at 224 pixels on a CPU. By default they get only the first
--coordinates outputs; time is linear in that number, so a line through two such runs gives the time of all of them,
marked "extrapolated". --full runs all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from networks import SEED_TOPOLOGY, THETAS, NetworkRow, Settings, check_table, reject, show, summary
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.backends import resolve_device
from asvit_fast.bench.timer import print_header, save_rows
from asvit_fast.cost import topology_cost
from asvit_fast.topology import Topology

TOLERANCE = {
    "length distortion": 1e-5,
    "NTK condition": 2e-3,
    "parameters": 0.0,
}  # float32; kappa squares the Jacobian's
CURVE_BATCH = 6  # their batch of thetas
THEIRS = "VITA-Group/AsViT, eager"
FULL_HELP = "the authors' length distortion of all outputs: no extrapolation, minutes per round"


@contextlib.contextmanager
def authors_code(folder: Path, device: torch.device) -> Iterator[SimpleNamespace]:
    """Their Transformer, CellStructure and TEG, importable and able to run on a CPU."""
    if not (folder / "lib" / "procedures" / "teg.py").is_file():
        raise SystemExit(f"{folder} is no clone of github.com/VITA-Group/AsViT (no lib/procedures/teg.py)")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(folder / "lib"), str(folder), *sys.path]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # moved imports of timm, torch.svd
        if device.type != "cuda":
            for owner, name, value in (
                (Tensor, "cuda", lambda self, *_, **__: self),
                (nn.Module, "cuda", lambda self, *_, **__: self),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "empty_cache", lambda: None),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
        from models import CellStructure, Transformer
        from procedures import TEG

        yield SimpleNamespace(CellStructure=CellStructure, Transformer=Transformer, TEG=TEG)


def their_network(theirs: SimpleNamespace, settings: Settings) -> nn.Module:
    topology = settings.topology
    genotype = theirs.CellStructure(str(topology))
    return theirs.Transformer(
        img_size=settings.img_size,
        patch_sizes=genotype.patch_sizes,
        stride=4,
        in_chans=3,
        num_classes=1000,
        embed_dim=topology.width,
        depths=topology.depths,
        num_heads=genotype.heads,
        window_sizes=genotype.window_sizes,
        mlp_ratios=genotype.mlp_ratios,
        drop_path_rate=0.0,
    )


def our_network(settings: Settings, state: dict[str, Tensor], norm: str) -> nn.Module:
    """Our network with their weights."""
    network = af.create_model(settings.topology, img_size=settings.img_size, pos_embed="none", norm=norm)
    network.load_state_dict(af.convert_asvit_state_dict(state))
    return network.to(settings.device)


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Seconds and result of one call; waits for the GPU on both sides."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scorer(theirs: SimpleNamespace, settings: Settings, batch: int) -> tuple[SimpleNamespace, Tensor]:
    """Their TEG for one network, fed with normal noise; and the two unit vectors of its circle, [2, 3, side, side]."""
    side = settings.img_size
    torch.manual_seed(1)
    images = torch.randn(batch, 3, side, side)  # [batch, 3, side, side]
    loader = [(images, torch.zeros(batch, dtype=torch.long))]
    torch.manual_seed(2)
    teg = theirs.TEG(loader, loader, repeat=1, size_curve=(THETAS, 3, side, side), batch_curve=CURVE_BATCH)
    torch.manual_seed(2)  # the same draw again: they keep the points of the circle, not its vectors
    vectors = torch.svd(torch.randn(3 * side**2, 2))[0]  # [N, 2]
    torch.manual_seed(3)
    teg.set_network(their_network(theirs, settings))
    return SimpleNamespace(teg=teg, images=images), vectors.T.reshape(2, 3, side, side)


def length_distortion(theirs: SimpleNamespace, settings: Settings, coordinates: int, full: bool) -> list[NetworkRow]:
    """The sum of ||v(theta)|| over 10 points of the circle, norms removed, scale 1."""
    case, circle = scorer(theirs, settings, 2)
    network = case.teg._networks[0]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    ours = our_network(settings, state, norm="identity")
    thetas = torch.linspace(0, 2 * math.pi, THETAS)  # [thetas]
    circle, thetas = circle.to(settings.device), thetas.to(settings.device)
    total = settings.topology.features
    counts = [total] if full else [coordinates // 8, coordinates]
    forward_features = network.forward_features

    def run_theirs(count: int) -> float:
        network.forward_features = lambda x: (None, forward_features(x)[1][:, :count])
        try:
            return case.teg.get_curve_complexity()
        finally:
            network.load_state_dict(state)  # they redraw the weights at the end

    def run_ours() -> Tensor:
        return af.curve(ours.score_features, thetas, circle[0], circle[1], scale=1.0, order=1).velocity

    their_times: list[list[float]] = [[] for _ in counts]
    our_times, difference = [], 0.0
    run_theirs(1)  # the first call of both finds its memory and threads
    run_ours()
    for _ in range(settings.long_rounds):
        for index, count in enumerate(counts):
            seconds, value = timed(lambda count=count: run_theirs(count), settings.device)
            their_times[index].append(seconds)
            our_seconds, velocity = timed(run_ours, settings.device)  # velocity: [thetas, features]
            our_times.append(our_seconds)
            mine = float(velocity[:, :count].double().norm(dim=1).sum())
            difference = max(difference, abs(mine - value) / abs(value))
    theirs_s = [line(counts, times, total) for times in zip(*map(sorted, their_times), strict=True)]
    note = f"all {total} outputs" if full else f"extrapolated from {counts[0]} and {counts[1]} of {total} outputs"
    return pair(settings, "length distortion", theirs_s, our_times, difference, note)


def line(counts: list[int], seconds: tuple[float, ...], total: int) -> float:
    """Seconds at ``total`` outputs, on the line through two measurements; with one, that one."""
    if len(counts) == 1:
        return seconds[0]
    slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + slope * (total - counts[1])


def ntk_condition(theirs: SimpleNamespace, settings: Settings) -> list[NetworkRow]:
    """The condition number of the Gram matrix of a batch's weight gradients."""
    case, _ = scorer(theirs, settings, settings.batch)
    images = case.images.to(settings.device)
    their_times, our_times, difference = [], [], 0.0
    for _ in range(settings.long_rounds):
        seconds, value = timed(case.teg.get_ntk, settings.device)  # redraws the weights first, and leaves them
        their_times.append(seconds)
        ours = our_network(settings, case.teg._networks[0].state_dict(), norm="layer")
        our_seconds, mine = timed(
            lambda ours=ours: af.ntk_condition(af.ntk_gram(ours, images, parameters="weights")), settings.device
        )
        our_times.append(our_seconds)
        difference = max(difference, abs(mine - value) / abs(value))
    return pair(settings, "NTK condition", their_times, our_times, difference, f"batch {settings.batch}")


def parameters(theirs: SimpleNamespace, settings: Settings) -> list[NetworkRow]:
    """Number of parameters: they build the network, ours is counted without memory for weights."""
    their_times, our_times, difference = [], [], 0.0
    for _ in range(settings.long_rounds):
        seconds, network = timed(lambda: their_network(theirs, settings), settings.device)
        their_times.append(seconds)
        our_seconds, mine = timed(lambda: topology_cost(settings.topology, settings.img_size), settings.device)
        our_times.append(our_seconds)
        expected = sum(parameter.numel() for parameter in network.parameters())
        difference = max(difference, abs(mine.params - expected) / expected)
    return pair(settings, "parameters", their_times, our_times, difference, "builds the network")


def pair(
    settings: Settings, case: str, theirs: list[float], ours: list[float], difference: float, note: str
) -> list[NetworkRow]:
    """Their row, with the note, and ours; their number is the truth."""
    reject(case, {"ours": difference}, TOLERANCE[case])
    row = NetworkRow.of_network
    return [
        row(settings, case, THEIRS, summary(theirs), difference, note),
        row(settings, case, "ours", summary(ours), difference, ""),
    ]


def rows(folder: Path, settings: Settings, coordinates: int = 32, full: bool = False) -> list[NetworkRow]:
    """All rows; ``folder`` is a clone of their repository."""
    with authors_code(folder.resolve(), settings.device) as theirs:
        return [
            *length_distortion(theirs, settings, coordinates, full),
            *ntk_condition(theirs, settings),
            *parameters(theirs, settings),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="clone of VITA-Group/AsViT")
    parser.add_argument("--topology", default=SEED_TOPOLOGY, help="default: the paper's seed")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images of the NTK (default: 16)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of theirs and ours (default: 3)")
    parser.add_argument("--coordinates", type=int, default=32, metavar="N", help="outputs they get (default: 32)")
    parser.add_argument("--full", action="store_true", help=FULL_HELP)
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="append the rows to this file")
    options = parser.parse_args()
    device = resolve_device(options.device)
    topology = Topology.parse(options.topology)
    settings = Settings(device, topology, options.img_size, options.batch, long_rounds=options.rounds)
    check_table(options.csv, device)
    print_header(device)
    measured = rows(options.reference, settings, options.coordinates, options.full)
    show(measured)
    if options.csv is not None:
        save_rows(options.csv, measured, device)


if __name__ == "__main__":
    main()
