"""``asvit-fast study``: do scores of untrained networks predict accuracies? (As-ViT, Table 2 and Figure 2)."""

from __future__ import annotations

import math
import shlex
from types import SimpleNamespace

from ..recipe import Recipe
from ..settings import StudySettings
from ..studies import Study, study
from ..studies.analysis import ALL_KINDS
from ..topology import SearchSpace
from .common import check_output_folder, print_on_main, table
from .long_run import announce_folder, long_run
from .options import chosen


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    announce_folder(values.out, values.quiet)
    recipe = chosen(values, Recipe)
    recipe.pop("seed")  # of the study
    result = study(
        values.data,
        epochs=values.epochs,
        out=values.out,
        accuracies=values.accuracies,
        candidates=values.candidates,
        space=SearchSpace().narrow(**values.space),
        img_size=values.img_size,
        thetas=values.thetas,
        batch=values.batch,
        images=values.images,
        seed=values.seed,
        device=values.device,
        progress=not values.quiet,
        **chosen(values, StudySettings),
        **recipe,
    )
    print_on_main(describe(result))
    print_on_main(f"\nlook at it:   asvit-fast report {shlex.quote(values.out)}", values.quiet)
    return 0


def describe(result: Study) -> str:
    """Kendall's tau of every measure, the best first, and how far noise lets a measure come."""
    rows = [("measure", "Kendall's tau [95 %]", "at equal parameters", "top 10 % found", "regret", "seconds")]
    taus, equal = result.kendall_tau, result.tau_at_equal_params
    names = sorted(taus, key=lambda name: -taus[name].value if math.isfinite(taus[name].value) else math.inf)
    for name in names:
        numbers = f"{100 * result.precision_at_top[name]:.0f} %", f"{result.regret[name]:.1f}"
        row = ALL_KINDS[name].title, str(taus[name]), str(equal[name]), *numbers, f"{result.seconds[name]:.3f}"
        rows.append(row)
    return "\n".join([table(rows), *facts(result)])


def facts(result: Study) -> list[str]:
    """What to hold the table against, in sentences."""
    accuracy = result.to_dict()["top1"]
    spread = f"top-1 from {accuracy['lowest']:.1f} to {accuracy['highest']:.1f} %, mean {accuracy['mean']:.1f} %"
    lines = ["", f"{len(result.rows)} topologies: {spread}; by chance, regret {result.analysis.chance_regret():.1f}."]
    if result.noise is not None:
        lines.append(
            f"Another seed changes top-1 by {result.noise.within:.1f} (standard deviation; {result.noise.networks} "
            f"topologies were trained several times), so a perfect measure would reach a tau of about "
            f"{result.noise.ceiling:.2f}."
        )
    if result.diverged:
        lines.append(f"{len(result.diverged)} diverged and rank last: {', '.join(result.diverged)}.")
    return lines
