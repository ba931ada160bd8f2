"""``asvit-fast scale``: grow a seed topology to a size (As-ViT, Algorithm 2)."""

from __future__ import annotations

from types import SimpleNamespace

from ..scoring.memory import keep_freed_memory
from ..search import ScaleStep, scale
from ..settings import ScaleSettings, ScoreSettings
from ..topology import Topology
from ..what import resolve_topology
from .common import amount, check_output_folder, say, scoring_text, table
from .long_run import announce_folder, long_run
from .options import chosen


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    keep_freed_memory()
    topology = resolve_topology(values.topology)
    announce(values, topology)
    steps = scale(
        topology,
        images=values.images,
        seed=values.seed,
        out=values.out,
        progress=not values.quiet,
        **chosen(values, ScaleSettings, ScoreSettings),
    )
    conclude(values, steps)
    return 0


def announce(values: SimpleNamespace, topology: Topology) -> None:
    ceiling = values.max_params
    until = (
        f"from {amount(ceiling[0])} parameters on it stops, {amount(ceiling[1])} are never exceeded"
        if isinstance(ceiling, tuple)
        else f"up to {amount(ceiling)} parameters"
    )
    say(
        f"Growing {topology}, {until}: each step scores the wider and deeper candidates with {scoring_text(values)}.",
        values.quiet,
    )
    announce_folder(values.out, values.quiet)


def conclude(values: SimpleNamespace, steps: list[ScaleStep]) -> None:
    rows: list[tuple[object, ...]] = [("step", "topology", "parameters", "multiply-adds")]
    rows += [(step.step, str(step.topology), amount(step.params), amount(step.flops)) for step in steps]
    say(table(rows), values.quiet)
    say("", values.quiet)
    say(f"use it:       asvit-fast export {values.out} --to model", values.quiet)
    say(f"look at it:   asvit-fast report {values.out}", values.quiet)
    if values.quiet:
        say(str(steps[-1].topology))
