"""``asvit-fast scale``: grow a seed topology to a size (As-ViT, Algorithm 2)."""

from __future__ import annotations

from types import SimpleNamespace

from .common import (
    QUIET,
    SCORING,
    WHAT,
    amount,
    check_output_folder,
    initialisations,
    say,
    size_text,
    source_text,
    table,
)
from .long_run import announce_folder, long_run
from .options import Command, Option, integer, limit, text


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    from ..scoring.memory import disable_malloc_trim
    from ..search import scale
    from ..what import resolve_topology

    disable_malloc_trim()
    topology = resolve_topology(values.topology)
    announce(values, topology)
    steps = scale(
        topology,
        max_params=values.max_params,
        max_steps=values.max_steps,
        img_size=values.img_size,
        thetas=values.thetas,
        repeats=values.repeats,
        batch=values.batch,
        images=values.images,
        seed=values.seed,
        convention=values.convention,
        norms=values.norms,
        device=values.device,
        out=values.out,
        progress=not values.quiet,
        shrink=values.shrink,
    )
    conclude(values, steps)
    return 0


def announce(values: SimpleNamespace, topology) -> None:
    ceiling = values.max_params
    until = (
        f"from {amount(ceiling[0])} parameters on it stops, {amount(ceiling[1])} are never exceeded"
        if isinstance(ceiling, tuple)
        else f"up to {amount(ceiling)} parameters"
    )
    say(
        f"Growing {topology}, {until}: each step scores the wider and deeper candidates with "
        f"{initialisations(values.repeats)} at {size_text(values.img_size)} pixels on {source_text(values.images)}; "
        f"{values.convention} convention, seed {values.seed}.",
        values.quiet,
    )
    announce_folder(values.out, values.quiet)


def conclude(values: SimpleNamespace, steps: list) -> None:
    rows = [("step", "topology", "parameters", "multiply-adds")]
    rows += [(step.step, str(step.topology), amount(step.params), amount(step.flops)) for step in steps]
    say(table(rows), values.quiet)
    say("", values.quiet)
    say(f"use it:       asvit-fast export {values.out} --to model", values.quiet)
    say(f"look at it:   asvit-fast report {values.out}", values.quiet)
    if values.quiet:
        say(str(steps[-1].topology))


COMMAND = Command(
    name="scale",
    summary="Grow a topology in depth and width without training, up to a number of parameters.",
    options=(
        Option("topology", text, None, f"what has the topology to start from: {WHAT}", positional=True, required=True),
        Option("out", text, None, "run directory, made or continued", "DIR", required=True),
        Option(
            "max_params",
            limit,
            100_000_000,
            "largest number of parameters, also of a run on record; or 80M:110M = stop from the first number on, never "
            "exceed the second",
            "NUMBER",
        ),
        Option("max_steps", integer(1), None, "largest number of growth steps", "N"),
        Option(
            "shrink",
            integer(1),
            None,
            "real width / scored width, a whole number; without it 1, or 4 in the reference convention",
            "N",
        ),
        *SCORING,
        QUIET,
    ),
    run=run,
    epilog="example: asvit-fast scale '8,2,3|4,1,2|4,1,4|4,1,6|32' --out runs/scale --max-params 30M",
    resumable=True,
)
