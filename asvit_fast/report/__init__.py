"""A run directory, or the rows of a benchmark, as pictures: PNG plots and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..bench.rows import read_rows
from ..errors import InputError
from ..files import write_atomic
from ..run_directory import TRACE
from ..runs import KINDS, Run, find_compared, find_runs
from .bench_tables import NOTE, bench_section
from .comparison_tables import agreement_table, reached_table
from .groups import groups_of
from .page import DESIGN_NOTE, Section, render

__all__ = ["report"]


def report(directory: str | Path) -> Path:
    """Draw the run of ``search``, ``scale``, ``train``, ``detect`` or ``study`` in ``directory``, or those in its
    subfolders of these names; or compare the searches and growths in its subfolders of other names, by their rules.

    Writes the plots as PNG files and ``report.html``, which holds them too and needs no other file, into ``directory``.
    A run that is still going, or was stopped, is drawn as far as it got. Of a file of ``asvit-fast bench`` (CSV or
    JSON), plots and page are written beside it, with its name. Returns the path of the page. Raises InputError when
    there is no run, nothing to draw yet, a file that cannot be understood, or no way to write.
    """
    directory = Path(directory)
    if not directory.exists():
        find_runs(directory, KINDS)  # says what to give
    try:
        from . import bench_plots, comparison_plots, detection_plots, plots, study_plots, training_plots
    except ModuleNotFoundError as error:
        raise InputError(f"a report needs {error.name}; pip install 'asvit-fast[report]'") from None
    if directory.is_file():
        rows = read_rows(directory)
        section = bench_section(directory, rows, bench_plots.throughput, bench_plots.memory)
        return _write(directory.with_suffix(".html"), directory.name, [section], NOTE)
    compared, left_out = find_compared(directory)
    if compared:
        figures = {"search": comparison_plots.searches, "scale": comparison_plots.growths}
        sections = compared_sections(compared, left_out, figures)
        return _write(directory / "report.html", directory.resolve().name, sections)
    draw: dict[str, dict[str, Callable[[Run], bytes]]] = {
        "search": {
            "search_progress.png": plots.progress,
            "search_candidates.png": plots.search_candidates,
            "search_pareto.png": plots.pareto,
        },
        "scale": {"scale_trajectory.png": plots.trajectory, "scale_candidates.png": plots.scale_candidates},
        "study": {"study_scatter.png": study_plots.scatter, "study_taus.png": study_plots.taus},
        "train": {"train_epochs.png": training_plots.epochs, "train_cost.png": training_plots.cost},
        "detect": {"detect_epochs.png": training_plots.epochs, "detect_cost.png": training_plots.cost},
    }
    more = {"detect": detection_plots.pictures}
    sections = [_section(run, draw[run.kind], more.get(run.kind)) for run in find_runs(directory, KINDS)]
    return _write(directory / "report.html", directory.resolve().name, sections)


def _write(page: Path, name: str, sections: list[Section], note: str = DESIGN_NOTE) -> Path:
    for section in sections:
        for file_name, png in section.images.items():
            write_atomic(page.parent / file_name, png)
    write_atomic(page, render(name, sections, note))
    return page


def compared_sections(
    runs: Sequence[Run], left_out: Sequence[str], figures: Mapping[str, Callable[[Sequence[Run]], bytes]]
) -> list[Section]:
    """A section for the growths and one for the searches."""
    others = f"; not compared: {', '.join(left_out)}" if left_out else ""
    sections = []
    for kind, title in (("scale", "Growths compared"), ("search", "Searches compared")):
        own = [run for run in runs if run.kind == kind]
        if own:
            searches = [group for group in groups_of(own) if group.rule == "reinforce" and len(group.runs) > 1]
            tables = [reached_table(own), *map(agreement_table, searches)]
            images = {f"{kind}_compared.png": figures[kind](own)}
            sections.append(Section(title, f"{len(own)} runs{others}", "", images, tables))
    return sections


def _section(
    run: Run, draw: dict[str, Callable[[Run], bytes]], more: Callable[[Run], dict[str, bytes]] | None = None
) -> Section:
    """``more`` draws what a run may have or not."""
    try:
        images = {name: function(run) for name, function in draw.items()}
        return Section.of(run, images | (more(run) if more else {}))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{str(run.directory / TRACE)!r} is not a trace of {run.kind} ({type(error).__name__}: {error}); "
            "was it edited or written by another version?"
        ) from error
