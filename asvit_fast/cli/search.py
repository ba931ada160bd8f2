"""``asvit-fast search``: find a seed topology without training (As-ViT, Algorithm 1)."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

from .common import QUIET, SCORING, amount, check_output_folder, initialisations, say, size_text, source_text, table
from .long_run import announce_folder, long_run
from .options import Command, Option, bounds, choice, choices_per_dimension, fraction, integer, number, positive, text


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    from ..scoring.memory import disable_malloc_trim
    from ..search import search
    from ..topology import SearchSpace

    disable_malloc_trim()
    space = SearchSpace().narrow(**values.space)
    announce(values, space)
    result = search(
        space=space,
        steps=values.steps,
        img_size=values.img_size,
        thetas=values.thetas,
        repeats=values.repeats,
        batch=values.batch,
        width=values.width,
        images=values.images,
        seed=values.seed,
        budget=budget(values),
        convention=values.convention,
        norms=values.norms,
        device=values.device,
        out=values.out,
        progress=not values.quiet,
        history=values.history,
        lr=values.lr,
        momentum=values.momentum,
        baseline=values.baseline,
    )
    conclude(values, result)
    return 0


def budget(values: SimpleNamespace):
    """The size window, or None when every size is welcome; ``--max-params`` lowers the high end of ``--params``."""
    from ..search import Budget

    low, high = values.params or (None, None)
    ceilings = [ceiling for ceiling in (high, values.max_params) if ceiling is not None]
    params = (low, min(ceilings)) if ceilings else (low, None)
    if params == (None, None) and values.flops is None:
        return None
    return Budget(params=params, flops=values.flops)


def announce(values: SimpleNamespace, space) -> None:
    say(
        f"Searching {space.size:,} topologies (entropy {space.entropy:.2f} nats) in {values.steps} steps: each scores "
        f"{initialisations(values.repeats)} at {size_text(values.img_size)} pixels on {source_text(values.images)}; "
        f"{values.convention} convention, seed {values.seed}.",
        values.quiet,
    )
    announce_folder(values.out, values.quiet)


def conclude(values: SimpleNamespace, result) -> None:
    topology = str(result.topology)
    say(f"Found {topology}", values.quiet)
    say(f"({amount(result.params)} parameters, {amount(result.flops)} multiply-adds)", values.quiet)
    say("", values.quiet)
    say(table(scores(result)), values.quiet)
    say("", values.quiet)
    if result.best != result.most_probable:
        say(
            "The best sampled topology has better scores than the most probable one, which the paper takes.",
            values.quiet,
        )
        say("", values.quiet)
    images = f" --images {shlex.quote(values.images)}" if values.images else ""
    out = shlex.quote(values.out)
    say(f"grow it:      asvit-fast scale '{topology}'{images} --max-params 100M --out {out}-scaled", values.quiet)
    say(f"look at it:   asvit-fast report {out}", values.quiet)
    if values.quiet:
        say(topology)


def scores(result) -> list[tuple[str, ...]]:
    """The policy's choice beside the best sampled topology and the best random one."""
    rows: list[tuple[str, ...]] = [("", "length distortion", "NTK condition", "parameters", "topology")]
    found = [
        ("most probable of the policy", result.most_probable),
        (f"best of {result.steps} sampled", result.best_sampled),
    ]
    if result.baseline is not None:
        found.append((f"best of {len(result.baseline.trace)} random", result.baseline.best))
    for name, one in found:
        if one is None:
            rows.append((name, "none is finite", "", "", ""))
        else:
            values = f"{one.length_distortion:.5g}", f"{one.ntk_condition:.5g}", amount(one.params)
            rows.append((name, *values, one.topology.seed_string))
    return rows


COMMAND = Command(
    name="search",
    summary="Find a seed topology without training, by policy gradient on the scores.",
    options=(
        Option("out", text, None, "run directory, made or continued", "DIR", required=True),
        Option("steps", integer(1), 500, "number of topologies to sample; a run on record goes on with more", "N"),
        *SCORING,
        Option("params", bounds, None, "window of the number of parameters: LOW:HIGH, :10M or 1M:", "LO:HI"),
        Option("flops", bounds, None, "window of the number of multiply-adds per image: LOW:HIGH, :1G or 1M:", "LO:HI"),
        Option("max_params", number, None, "largest number of parameters: the high end of --params", "NUMBER"),
        Option(
            "space",
            choices_per_dimension,
            {},
            "narrow a dimension (K1..K4, S1..S3, E1..E4, heads): --space K1=8 --space heads=16,32; may be repeated",
            "NAME=CHOICES",
            repeated=True,
        ),
        Option("width", integer(1), 32, "number of channels in the first stage of the scored networks", "N"),
        Option("lr", positive, 0.08, "learning rate of the policy, a number above 0", "X"),
        Option(
            "momentum",
            fraction,
            0.9,
            "momentum of the moving average that rewards are compared with, a number below 1",
            "X",
        ),
        Option("history", integer(1), 20, "number of steps in the range of the reference convention's reward", "N"),
        Option(
            "baseline",
            choice("random"),
            None,
            "random = also score as many topologies drawn uniformly, for comparison; a finished run may add them",
            "NAME",
        ),
        QUIET,
    ),
    run=run,
    epilog="example: asvit-fast search --out runs/search --images photos/ --steps 500",
    resumable=True,
)
