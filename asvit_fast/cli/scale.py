"""``asvit-fast scale``: grow a seed topology to a size (As-ViT, Algorithm 2)."""

from __future__ import annotations

from types import SimpleNamespace

from ..search import ScaleStep, scale
from ..settings import ScaleSettings, ScoreSettings
from ..topology import Topology
from ..what import resolve_topology
from .common import check_output_folder, format_count, print_on_main, scoring_text, table
from .long_run import long_run
from .options import chosen


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
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
        f"from {format_count(ceiling[0])} parameters on it stops, {format_count(ceiling[1])} are never exceeded"
        if isinstance(ceiling, tuple)
        else f"up to {format_count(ceiling)} parameters"
    )
    scores = values.rule == ScaleSettings.rule
    does = "scores the wider and deeper candidates" if scores else f"takes what rule {values.rule} says, and scores it"
    print_on_main(
        f"Growing {topology}, {until}: each step {does} with {scoring_text(values)}.",
        values.quiet,
    )


def conclude(values: SimpleNamespace, steps: list[ScaleStep]) -> None:
    rows: list[tuple[object, ...]] = [("step", "topology", "parameters", "multiply-adds")]
    rows += [(step.step, str(step.topology), format_count(step.params), format_count(step.flops)) for step in steps]
    use_it, look_at_it = f"asvit-fast export {values.out} --to model", f"asvit-fast report {values.out}"
    lines = [table(rows), "", f"use it:       {use_it}", f"look at it:   {look_at_it}"]
    print_on_main(str(steps[-1].topology) if values.quiet else "\n".join(lines))
