"""``asvit-fast search``: find a seed topology without training (As-ViT, Algorithm 1)."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

from ..search import Budget, SearchResult, search
from ..settings import ScoreSettings, SearchSettings
from ..topology import SearchSpace
from .common import check_output_folder, format_count, print_on_main, scoring_text, table
from .long_run import long_run
from .options import chosen


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    space = SearchSpace().narrow(**values.space)
    announce(values, space)
    result = search(
        space=space,
        images=values.images,
        seed=values.seed,
        budget=budget(values),
        out=values.out,
        progress=not values.quiet,
        baseline=values.baseline,
        **chosen(values, SearchSettings, ScoreSettings),
    )
    conclude(values, result)
    return 0


def budget(values: SimpleNamespace) -> Budget | None:
    """The size window, or None when every size is welcome; ``--max-params`` lowers the high end of ``--params``."""
    low, high = values.params or (None, None)
    ceilings = [ceiling for ceiling in (high, values.max_params) if ceiling is not None]
    params = (low, min(ceilings)) if ceilings else (low, None)
    if params == (None, None) and values.flops is None and values.latency_ms is None:
        return None
    return Budget(params=params, flops=values.flops, latency_ms=values.latency_ms)


def announce(values: SimpleNamespace, space: SearchSpace) -> None:
    print_on_main(
        f"Searching {space.size:,} topologies (entropy {space.entropy:.2f} nats) in {values.steps} steps: each scores "
        f"{scoring_text(values)}.",
        values.quiet,
    )


def conclude(values: SimpleNamespace, result: SearchResult) -> None:
    topology, out = str(result.topology), shlex.quote(values.out)
    size = f"({format_count(result.params)} parameters, {format_count(result.flops)} multiply-adds)"
    lines = [f"Found {topology}", size, "", table(scores(result, values.rule)), ""]
    if values.rule == "reinforce" and result.best != result.most_probable:
        lines += ["The best sampled topology has better scores than the most probable one, which the paper takes.", ""]
    images = f" --images {shlex.quote(values.images)}" if values.images else ""
    lines.append(f"grow it:      asvit-fast scale '{topology}'{images} --max-params 100M --out {out}-scaled")
    lines.append(f"look at it:   asvit-fast report {out}")
    print_on_main(topology if values.quiet else "\n".join(lines))


def scores(result: SearchResult, rule: str) -> list[tuple[str, ...]]:
    """What the search found beside the best sampled topology and the best random one."""
    rows: list[tuple[str, ...]] = [("", "length distortion", "NTK condition", "parameters", "topology")]
    policy = rule == "reinforce"
    found = [
        ("most probable of the policy" if policy else "result, scored once more", result.most_probable),
        (f"best of {result.steps} sampled", result.best_sampled),
    ]
    if result.baseline is not None:
        found.append((f"best of {len(result.baseline.trace)} random", result.baseline.best))
    for name, one in found:
        if one is None:
            rows.append((name, "none is finite", "", "", ""))
        else:
            values = f"{one.length_distortion:.5g}", f"{one.ntk_condition:.5g}", format_count(one.params)
            rows.append((name, *values, one.topology.seed_string))
    return rows
