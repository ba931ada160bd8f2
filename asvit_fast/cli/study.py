"""``asvit-fast study``: do scores of untrained networks predict accuracies? (As-ViT, Table 2 and Figure 2)."""

from __future__ import annotations

import math
import shlex
from types import SimpleNamespace

from ..recipe import Recipe
from ..settings import StudySettings
from ..studies import Study, study
from ..studies.analysis import kind_of
from ..studies.words import Accuracies, remarks
from ..topology import SearchSpace
from .common import check_output_folder, print_on_main, table
from .long_run import long_run
from .options import chosen


@long_run()
def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    recipe = {name: value for name, value in chosen(values, Recipe).items() if name != "seed"}  # of the study
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
    print_on_main(describe(result, Accuracies(percent=values.accuracies is None)))
    print_on_main(f"\nlook at it:   asvit-fast report {shlex.quote(values.out)}", values.quiet)
    return 0


def describe(result: Study, written: Accuracies) -> str:
    """Kendall's tau of every measure, the best first, and what to hold the table against."""
    rows = [
        (
            "measure",
            "Kendall's tau [95 %]",
            "at equal parameters",
            f"best {result.analysis.best_tenth} found",
            "regret",
            "seconds",
        )
    ]
    taus, equal = result.kendall_tau, result.tau_at_equal_params
    names = sorted(taus, key=lambda name: -taus[name].value if math.isfinite(taus[name].value) else math.inf)
    for name in names:
        numbers = f"{100 * result.precision_at_top[name]:.0f} %", written(result.regret[name])
        row = kind_of(name).title, str(taus[name]), str(equal[name]), *numbers, f"{result.seconds[name]:.3f}"
        rows.append(row)
    top1 = result.to_dict()["top1"]
    spread = f"{written.name} from {written(top1['lowest'])} to {written(top1['highest'])}{written.unit}"
    chance = f"a random pick is {written(result.analysis.chance_regret())} behind the best"
    count = "1 topology" if len(result.rows) == 1 else f"{len(result.rows)} topologies"
    facts = f"{count}: {spread}, mean {written(top1['mean'])}{written.unit}; {chance}."
    return "\n".join([table(rows), "", facts, *remarks(result)])
