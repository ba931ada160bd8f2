"""Scores of whole networks: ours against torch.func, JAX and the authors' public code.

    python benchmarks/bench_scores.py [--only order1 order2 ...] [--csv FILE]
    pip install jax                                                  # for the rows of JAX
    git clone https://github.com/VITA-Group/AsViT                    # for those of the authors: --reference AsViT

    forward    the network alone, what derivatives are measured by
    order1     output and velocity along a circle: the pass behind length distortion
    order2     and acceleration: the pass behind curvature
    ntk        the Gram matrix of a batch's weight gradients
    topology   length distortion and NTK of 5 fresh networks of a topology, weights drawn
    search     steps of a topology search, and what they make of one of 500 steps
    authors    length distortion, NTK and parameter count in the authors' code (against_asvit.py), needs --reference
    ops        the ops on the shapes of these networks (bench_<op>.py, whose rows go to <op>.csv beside --csv)

All providers do the same work on the same float32 weights in one process, in turn. Their numbers are checked before
anything is timed, against float64 in plain operations (against ours for the authors' code): wrong numbers end the
program with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import against_asvit
import torch
from networks import (
    SEED_TOPOLOGY,
    THETAS,
    NetworkRow,
    Providers,
    Run,
    Settings,
    check_table,
    error,
    reject,
    show,
    summary,
)
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.bench.peers import attention_sdpa
from asvit_fast.bench.timer import Timing, print_header, save_rows
from asvit_fast.malloc import tune_allocator
from asvit_fast.scoring import ScoreSettings, score_repeat
from asvit_fast.scoring.draws import WEIGHTS, stream
from asvit_fast.topology import Topology

TOLERANCE = 1e-3  # float32 against float64, relative to the largest value
SCORE_TOLERANCE = 2e-3  # kappa squares the condition of the Jacobian
METRICS = ("length_distortion", "ntk_condition")
OPS = ("gelu_taylor", "normalization_taylor", "window_attention_taylor")
SEARCH_STEPS = 500
ELEMENTARY = "attention in plain PyTorch operations, as torch's fused one has no forward mode"


# --------------------------------------------------------------------------- providers


def single_jvp(fn: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Order 1; a function of this file, as torch.compile does not look into those of torch."""
    return torch.func.jvp(fn, (x,), (dx,))


def nested_jvp(fn: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order 2 along a circle (the second derivative of the input is -x), as torch.func nests it."""

    def velocity(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda s: fn(x + s * dx - s * s / 2 * x), (t,), (torch.ones_like(t),))

    zero = torch.zeros((), device=x.device, dtype=x.dtype)
    (y, v), (_, a) = torch.func.jvp(velocity, (zero,), (torch.ones_like(zero),))
    return y, v, a


def per_sample_gram(model: nn.Module, images: Tensor) -> Tensor:
    """The NTK Gram [B, B] through vmap(grad), one gradient per sample and parameter kept."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if "weight" in name}

    def total(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image.unsqueeze(0),)).sum()

    rows = torch.vmap(torch.func.grad(total), in_dims=(None, 0))(parameters, images)
    flat = [row.flatten(1) for row in rows.values()]  # of every parameter [B, elements]
    return torch.stack([row @ row.T for row in flat]).sum(0)  # one product over all would lose digits in float32


class Features(nn.Module):
    """``score_features`` as a forward, for functional_call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.score_features(x)


def with_reference(run: Run) -> object:
    """Our path with every op in plain PyTorch operations."""
    with backends.use_backend("reference"):
        return run()


def with_fused_attention(run: Run) -> object:
    """Our network with torch's fused attention under torch.func too, where we take the reference."""

    def fused(
        qkv: Tensor, num_heads: int, window: tuple[int, int], dropout: float = 0.0, attn_scale: None = None
    ) -> Tensor:
        return attention_sdpa(qkv, num_heads, list(window), [0, 0], None)

    with mock.patch.object(importlib.import_module("asvit_fast.nn.attention"), "window_attention", fused):
        return run()


def add_jax(providers: Providers, model: af.AsViT, names: tuple[str, ...], *inputs: Tensor) -> None:
    """JAX's functions ``names`` (see jax_asvit.py) of the network at these inputs."""
    settings = providers.settings
    if "jax" in settings.without:
        return
    try:
        import jax_asvit

        peer = jax_asvit.Peer(model, settings.device)
    except (ImportError, RuntimeError) as reason:
        print(f"jax: left out, {reason}")
        return
    for name in names:
        providers.add_compiled(f"jax.jit({name})", partial(peer.compile, name, *inputs), peer.note)


# --------------------------------------------------------------------------- passes


def forward(settings: Settings) -> list[NetworkRow]:
    """One forward of the images that the derivatives are taken of."""
    x, _ = circle_points(settings)
    providers = Providers(settings)
    providers.add("forward alone, eager", partial(settings.network("identity").score_features, x))
    expected = settings.network("identity", torch.float64).score_features(x.double())
    return providers.rows(f"forward, {THETAS} thetas", expected, TOLERANCE, settings.rounds)


def order_1(settings: Settings) -> list[NetworkRow]:
    """One pass of order 1 of the network without norms, as length distortion takes it."""
    model, (x, dx) = settings.network("identity"), circle_points(settings)
    fn = model.score_features
    providers = Providers(settings)
    providers.add("torch.func.jvp, eager", partial(single_jvp, fn, x, dx), ELEMENTARY)
    providers.add_compiled("torch.func.jvp, compiled", lambda: compiled(single_jvp, fn, x, dx), ELEMENTARY)
    add_jax(providers, model, ("jvp",), x, dx)
    ours = partial(af.jvp, fn, x, dx)
    providers.add("reference", partial(with_reference, ours), "our Taylor propagation, ops in torch operations")
    providers.add("ours", ours)
    exact = settings.network("identity", torch.float64)
    expected = with_reference(lambda: af.jvp(exact.score_features, x.double(), dx.double()))
    return providers.rows(f"order 1, {THETAS} thetas", expected, TOLERANCE, settings.rounds)


def order_2(settings: Settings) -> list[NetworkRow]:
    """One pass of order 2 of the same network, as curvature takes it."""
    model, (x, dx) = settings.network("identity"), circle_points(settings)
    fn = model.score_features
    providers = Providers(settings)
    providers.add("nested torch.func.jvp, eager", partial(nested_jvp, fn, x, dx), ELEMENTARY)
    providers.add_compiled("nested torch.func.jvp, compiled", lambda: compiled(nested_jvp, fn, x, dx), ELEMENTARY)
    add_jax(providers, model, ("nested jvp", "jet"), x, dx)
    ours = partial(af.jet, fn, x, dx, -x)
    providers.add("reference", partial(with_reference, ours), "our Taylor propagation, ops in torch operations")
    providers.add("ours", ours)
    exact = settings.network("identity", torch.float64)
    expected = with_reference(lambda: af.jet(exact.score_features, x.double(), dx.double(), -x.double()))
    return providers.rows(f"order 2, {THETAS} thetas", expected, TOLERANCE, settings.long_rounds)


def ntk(settings: Settings) -> list[NetworkRow]:
    """The Gram matrix of the network with norms."""
    model = settings.network("layer")
    torch.manual_seed(1)
    images = torch.randn(settings.batch, 3, settings.img_size, settings.img_size).to(settings.device)
    eager = torch.no_grad()(partial(per_sample_gram, Features(model), images))
    make = partial(compiled, per_sample_gram, Features(model), images)
    note = "one gradient per sample kept; attention "
    fused = f"{note}by SDPA, {'flash for CPU' if settings.device.type == 'cpu' else 'backend of its choice'}"
    providers = Providers(settings)
    providers.add("vmap(grad), eager", eager, f"{note}in plain PyTorch operations")
    providers.add("vmap(grad), SDPA, eager", partial(with_fused_attention, eager), fused)
    providers.add_compiled("vmap(grad), compiled", make, f"{note}in plain PyTorch operations")
    providers.add_compiled("vmap(grad), SDPA, compiled", lambda: partial(with_fused_attention, make()), fused)
    add_jax(providers, model, ("vmap(grad)",), images)
    ours = partial(af.ntk_gram, model, images)
    providers.add("reference", partial(with_reference, ours), "our contractions, ops in torch operations")
    providers.add("ours", ours)
    exact = settings.network("layer", torch.float64)
    expected = with_reference(lambda: af.ntk_gram(exact, images.double()))
    return providers.rows(f"NTK Gram, batch {settings.batch}", expected, TOLERANCE, settings.rounds)


def circle_points(settings: Settings) -> tuple[Tensor, Tensor]:
    """Images and their velocity, each [thetas, 3, side, side]."""
    torch.manual_seed(1)
    x, dx = torch.randn(2, THETAS, 3, settings.img_size, settings.img_size)
    return x.to(settings.device), dx.to(settings.device)


def compiled(function: Callable[..., object], *arguments: object) -> Run:
    """The function through torch.compile, ready to run on these arguments."""
    return torch.no_grad()(partial(torch.compile(function, dynamic=False), *arguments))


# --------------------------------------------------------------------------- topologies


def exact_scores(settings: Settings, topology: Topology, seed: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """The measures of every network of ``af.score(topology)`` in float64 plain PyTorch operations, by metric."""
    score_settings = ScoreSettings(METRICS, settings.img_size, THETAS, settings.repeats, settings.batch)
    results = []
    for repeat in range(settings.repeats):
        model = af.create_model(topology, img_size=settings.img_size, num_classes=0, weight_init="skip")
        model.init_weights(generator=stream(*seed, WEIGHTS, repeat))
        model = model.to(settings.device, torch.float64).eval()
        results.append(with_reference(partial(score_repeat, model, repeat, score_settings, seed=seed)))
    return [tuple(torch.tensor(one[metric]["value"]).double() for one in results) for metric in METRICS]


def whole_topology(settings: Settings) -> list[NetworkRow]:
    """Both measures of all networks of a topology, from nothing to numbers."""

    def ours() -> tuple[Tensor, ...]:
        score = af.score(
            settings.topology, METRICS, settings.img_size, THETAS, settings.repeats, settings.batch, seed=0,
            device=settings.device,
        )  # fmt: skip
        return tuple(torch.tensor(value) for metric in METRICS for value in score[metric].values)

    providers = Providers(settings)
    providers.add("ours", ours, "af.score, metrics length_distortion and ntk_condition, weights drawn anew")
    length, condition = exact_scores(settings, settings.topology, (0,))
    case = f"topology, {settings.repeats} networks, {THETAS} thetas, batch {settings.batch}"
    return providers.rows(case, (*length, *condition), SCORE_TOLERANCE, settings.rounds)


def search(settings: Settings) -> list[NetworkRow]:
    """Steps of a search, drawing, scoring and learning; the last one's measures are checked."""
    run = partial(
        af.search, img_size=settings.img_size, repeats=settings.repeats, thetas=THETAS, batch=settings.batch, seed=0,
        device=settings.device, progress=False,
    )  # fmt: skip
    run(steps=1)  # memory and threads
    trace = run(steps=settings.steps).trace
    last = trace[-1]
    exact = exact_scores(settings, Topology.parse(last["topology"]), (0, last["step"]))
    means = [torch.stack(values).mean() for values in exact]
    deviation = error([torch.tensor(last[metric]) for metric in METRICS], means)
    reject("search", {"ours": deviation}, SCORE_TOLERANCE)
    seconds = [record["seconds"] for record in trace]
    mean, standard_error = statistics.fmean(seconds), statistics.stdev(seconds) / len(seconds) ** 0.5
    bounds = (mean, mean - standard_error, mean + standard_error)
    total = Timing(*(SEARCH_STEPS * value for value in bounds), len(seconds))
    spread = f"topologies differ in cost: fastest step {min(seconds):.3g} s, slowest {max(seconds):.3g} s"
    how = f"extrapolated: {SEARCH_STEPS} x the mean of {len(seconds)} steps, quartiles stand for -+ its standard error"
    return [
        NetworkRow.of_network(settings, "search, one step", "ours", summary(seconds), deviation, spread),
        NetworkRow.of_network(settings, f"search, {SEARCH_STEPS} steps", "ours", total, deviation, how),
    ]


# --------------------------------------------------------------------------- command line

SECTIONS = {
    "forward": torch.no_grad()(forward),
    "order1": torch.no_grad()(order_1),
    "order2": torch.no_grad()(order_2),
    "ntk": ntk,
    "topology": whole_topology,
    "search": search,
}


def run_ops(arguments: argparse.Namespace, device: torch.device) -> None:
    """The benchmarks of the ops, each in a process of its own."""
    for op in OPS:
        command = [sys.executable, str(Path(__file__).with_name(f"bench_{op}.py")), "--device", str(device)]
        if arguments.rounds is not None:
            command += ["--rounds", str(max(arguments.rounds, 2))]
        if arguments.threads is not None:
            command += ["--threads", str(arguments.threads)]
        if arguments.csv is not None:
            command += ["--csv", str(arguments.csv.with_name(f"{op}.csv"))]
        subprocess.run(command, check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SECTIONS, "authors", "ops"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help="default: all parts")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="WORD",
        help="leave out providers with one of these words in their name, e.g. jax, compiled",
    )  # fmt: skip
    parser.add_argument("--reference", type=Path, default=None, metavar="DIR", help="clone of VITA-Group/AsViT")
    parser.add_argument("--full", action="store_true", help=against_asvit.FULL_HELP)
    parser.add_argument("--topology", default=SEED_TOPOLOGY, help="default: the paper's seed topology")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images of the NTK (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="networks of a topology (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the search (default: %(default)s)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=None, help="torch's CPU threads (default: torch's)")
    parser.add_argument("--keep-freed-memory", action="store_true", help="for all providers, as our commands do")
    parser.add_argument("--rounds", type=int, default=None, help="turns per provider (default: 5; ops: theirs)")
    parser.add_argument("--long-rounds", type=int, default=3, help="of order2 and authors (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    for name, least in (("rounds", 1), ("long_rounds", 1), ("repeats", 1), ("batch", 1), ("steps", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return arguments


def main() -> None:
    """Run the parts, saving the rows of each when it has ended."""
    arguments = parse()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 for everybody
    if arguments.keep_freed_memory and not tune_allocator():
        raise SystemExit("--keep-freed-memory needs glibc")
    device = backends.resolve_device(arguments.device)
    settings = Settings(
        device, Topology.parse(arguments.topology), arguments.img_size, arguments.batch, arguments.repeats,
        arguments.steps, arguments.rounds or Settings.rounds, arguments.long_rounds, tuple(arguments.without),
        arguments.keep_freed_memory,
    )  # fmt: skip
    check_table(arguments.csv, device)
    print_header(device)
    sections: dict[str, Callable[[Settings], list[NetworkRow]]] = dict(SECTIONS)
    if arguments.reference is not None:
        sections["authors"] = partial(against_asvit.rows, arguments.reference, full=arguments.full)
    for name in arguments.only:
        if name == "ops":
            run_ops(arguments, device)
        elif name in sections:
            rows = sections[name](settings)
            show(rows)
            if arguments.csv is not None:
                save_rows(arguments.csv, rows, device)
        else:
            print("authors: left out, --reference names no clone of their code")


if __name__ == "__main__":
    main()
