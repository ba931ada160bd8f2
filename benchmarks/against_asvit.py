"""Our scores against the authors' public code, on the same weights, images and circles, in one process.

    git clone https://github.com/VITA-Group/AsViT
    python benchmarks/against_asvit.py --reference AsViT

Runs of theirs and ours alternate. Every row of the CSV carries the largest relative difference between their number and
ours; a row whose numbers disagree ends the program with exit code 1 and no time is claimed for it.

Their code calls .cuda(); without a GPU those calls are replaced by the identity while it runs. Their length distortion
takes 2 x 256 backward passes, minutes per network at 224 pixels on a CPU. By default they get only the first
--coordinates outputs; time is linear in that number, so a line through two such runs gives the time of all of them,
marked "extrapolated". --full runs all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from timer import machine, print_header
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.topology import Topology

RESULTS = Path(__file__).parent / "results" / "against_asvit.csv"
TOLERANCE = {"length_distortion": 1e-5, "ntk_condition": 2e-3, "params": 0.0}  # float32; kappa squares the Jacobian's
THETAS = 10
CURVE_BATCH = 6  # their batch of thetas


@dataclass(frozen=True)
class Row:
    """Seconds of one network, theirs and ours: median, smallest and largest over the rounds."""

    work: str
    topology: str
    img_size: int
    rounds: int
    extrapolated: bool
    theirs_s: float
    theirs_min_s: float
    theirs_max_s: float
    ours_s: float
    ours_min_s: float
    ours_max_s: float
    speedup: float
    relative_difference: float
    machine: str
    threads: str
    torch: str
    commit: str


@contextlib.contextmanager
def authors_code(folder: Path) -> Iterator[SimpleNamespace]:
    """Their Transformer, CellStructure and TEG, importable and able to run where there is no GPU."""
    if not (folder / "lib" / "procedures" / "teg.py").is_file():
        raise SystemExit(f"{folder} is no clone of github.com/VITA-Group/AsViT (no lib/procedures/teg.py)")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(folder / "lib"), str(folder), *sys.path]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # moved imports of timm, torch.svd
        if not torch.cuda.is_available():
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


def their_network(theirs: SimpleNamespace, topology: Topology, img_size: int) -> nn.Module:
    genotype = theirs.CellStructure(str(topology))
    return theirs.Transformer(
        img_size=img_size,
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


def our_network(topology: Topology, img_size: int, state: dict[str, Tensor], norm: str) -> nn.Module:
    """Our network with their weights, on the device they would use."""
    network = af.create_model(topology, img_size=img_size, pos_embed="none", norm=norm)
    network.load_state_dict(af.convert_asvit_state_dict(state))
    return network.to(device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds and result of one call; waits for the GPU on both sides."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def scorer(theirs: SimpleNamespace, topology: Topology, img_size: int, batch: int) -> tuple[SimpleNamespace, Tensor]:
    """Their TEG for one network, fed with normal noise; and the two unit vectors of its circle, [2, 3, side, side]."""
    torch.manual_seed(1)
    images = torch.randn(batch, 3, img_size, img_size)  # [batch, 3, side, side]
    loader = [(images, torch.zeros(batch, dtype=torch.long))]
    torch.manual_seed(2)
    teg = theirs.TEG(loader, loader, repeat=1, size_curve=(THETAS, 3, img_size, img_size), batch_curve=CURVE_BATCH)
    torch.manual_seed(2)  # the same draw again: they keep the points of the circle, not its vectors
    vectors = torch.svd(torch.randn(3 * img_size**2, 2))[0]  # [N, 2]
    torch.manual_seed(3)
    teg.set_network(their_network(theirs, topology, img_size))
    return SimpleNamespace(teg=teg, images=images), vectors.T.reshape(2, 3, img_size, img_size)


def length_distortion_row(theirs: SimpleNamespace, topology: Topology, options: argparse.Namespace) -> Row:
    """The sum of ||v(theta)|| over 10 points of the circle, norms removed, scale 1."""
    case, circle = scorer(theirs, topology, options.img_size, 2)
    network = case.teg._networks[0]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    ours = our_network(topology, options.img_size, state, norm="identity")
    thetas = torch.linspace(0, 2 * math.pi, THETAS)  # [thetas]
    circle, thetas = circle.to(device()), thetas.to(device())
    total = topology.features
    counts = [total] if options.full else [options.coordinates // 8, options.coordinates]
    full = network.forward_features

    def run_theirs(count: int) -> float:
        network.forward_features = lambda x: (None, full(x)[1][:, :count])
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
    for _ in range(options.rounds):
        for index, count in enumerate(counts):
            seconds, value = timed(lambda count=count: run_theirs(count))
            their_times[index].append(seconds)
            our_seconds, velocity = timed(run_ours)  # velocity: [thetas, features]
            our_times.append(our_seconds)
            mine = float(velocity[:, :count].double().norm(dim=1).sum())
            difference = max(difference, abs(mine - value) / abs(value))
    theirs_s = [line(counts, times, total) for times in zip(*map(sorted, their_times), strict=True)]
    return row("length_distortion", topology, options, theirs_s, our_times, difference, extrapolated=not options.full)


def line(counts: list[int], seconds: tuple[float, ...], total: int) -> float:
    """Seconds at ``total`` outputs, on the line through two measurements; with one, that one."""
    if len(counts) == 1:
        return seconds[0]
    slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + slope * (total - counts[1])


def ntk_row(theirs: SimpleNamespace, topology: Topology, options: argparse.Namespace) -> Row:
    """The condition number of the Gram matrix of a batch's weight gradients."""
    case, _ = scorer(theirs, topology, options.img_size, options.batch)
    images = case.images.to(device())
    their_times, our_times, difference = [], [], 0.0
    for _ in range(options.rounds):
        seconds, value = timed(case.teg.get_ntk)  # redraws the weights first, and leaves them
        their_times.append(seconds)
        ours = our_network(topology, options.img_size, case.teg._networks[0].state_dict(), norm="layer")
        our_seconds, mine = timed(lambda ours=ours: af.ntk_condition(af.ntk_gram(ours, images, parameters="weights")))
        our_times.append(our_seconds)
        difference = max(difference, abs(mine - value) / abs(value))
    return row("ntk_condition", topology, options, their_times, our_times, difference)


def params_row(theirs: SimpleNamespace, topology: Topology, options: argparse.Namespace) -> Row:
    """Number of parameters: they build the network, ours is counted without memory for weights."""
    from asvit_fast.cost import topology_cost

    their_times, our_times, difference = [], [], 0.0
    for _ in range(options.rounds):
        seconds, network = timed(lambda: their_network(theirs, topology, options.img_size))
        their_times.append(seconds)
        our_seconds, mine = timed(lambda: topology_cost(topology, options.img_size))
        our_times.append(our_seconds)
        expected = sum(parameter.numel() for parameter in network.parameters())
        difference = max(difference, abs(mine.params - expected) / expected)
    return row("params", topology, options, their_times, our_times, difference)


def row(
    work: str,
    topology: Topology,
    options: argparse.Namespace,
    theirs: list[float],
    ours: list[float],
    difference: float,
    extrapolated: bool = False,
) -> Row:
    median, our_median = statistics.median(theirs), statistics.median(ours)
    where = machine(torch.device(device()))
    return Row(
        work, str(topology), options.img_size, options.rounds, extrapolated,
        median, min(theirs), max(theirs), our_median, min(ours), max(ours), median / our_median, difference,
        where["machine"], where["threads"], where["torch"], where["commit"],
    )  # fmt: skip


def write(rows: list[Row], path: Path) -> None:
    """Replace the rows of the same work, topology, size and machine; keep the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(asdict(rows[0]))
    key = ("work", "topology", "img_size", "extrapolated", "machine", "threads")
    new = {tuple(str(asdict(one)[name]) for name in key): asdict(one) for one in rows}
    old = list(csv.DictReader(path.open())) if path.exists() else []
    kept = [one for one in old if tuple(one[name] for name in key) not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows([*kept, *new.values()])


def show(one: Row) -> None:
    mark = " (extrapolated)" if one.extrapolated else ""
    print(
        f"{one.work:18} theirs {one.theirs_s:9.4g} s{mark} [{one.theirs_min_s:.4g}, {one.theirs_max_s:.4g}]   "
        f"ours {one.ours_s:9.4g} s [{one.ours_min_s:.4g}, {one.ours_max_s:.4g}]   "
        f"{one.speedup:8.1f} x   difference {one.relative_difference:.1e}",
        flush=True,
    )


WORK = {"length_distortion": length_distortion_row, "ntk_condition": ntk_row, "params": params_row}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="clone of VITA-Group/AsViT")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what to measure (default: all)")
    parser.add_argument("--topology", default="8,2,3|4,1,2|4,1,4|4,1,6|32", help="default: the paper's seed")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images of the NTK (default: 16)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="alternations of theirs and ours (default: 3)"
    )
    parser.add_argument("--coordinates", type=int, default=32, metavar="N", help="outputs they get (default: 32)")
    parser.add_argument(
        "--full", action="store_true", help="give them all outputs: no extrapolation, minutes per round"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args()
    topology = Topology.parse(options.topology)
    print_header(torch.device(device()))
    print(f"{topology} at {options.img_size} pixels, {options.rounds} rounds; median [min, max]")
    rows, wrong = [], []
    with authors_code(options.reference.resolve()) as theirs:
        for work in options.work:
            one = WORK[work](theirs, topology, options)
            show(one)
            (rows if one.relative_difference <= TOLERANCE[work] else wrong).append(one)
    if rows:
        write(rows, options.csv)
    for one in wrong:
        print(f"{one.work}: the numbers disagree by {one.relative_difference:.1e}; no time recorded", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
