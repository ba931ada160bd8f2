"""A run directory as pictures: PNG plots and one self-contained ``report.html``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..files import write_atomic
from ..run_directory import TRACE
from ..runs import KINDS, Run, find_runs
from .page import Section, render

__all__ = ["report"]


def report(directory: str | Path) -> Path:
    """Draw the run of ``search``, ``scale`` or ``train`` in ``directory``, or those in its subfolders of these names.

    Writes the plots as PNG files and ``report.html``, which holds them too and needs no other file, into ``directory``.
    A run that is still going, or was stopped, is drawn as far as it got. Returns the path of the page. Raises
    InputError when there is no run, nothing to draw yet, a file that cannot be understood, or no way to write.
    """
    try:
        from . import plots, training_plots
    except ModuleNotFoundError as error:
        raise InputError(f"a report needs {error.name}; pip install 'asvit-fast[report]'") from None
    directory = Path(directory)
    draw: dict[str, dict[str, Callable[[Run], bytes]]] = {
        "search": {"search_progress.png": plots.progress, "search_candidates.png": plots.search_candidates},
        "scale": {"scale_trajectory.png": plots.trajectory, "scale_candidates.png": plots.scale_candidates},
        "train": {"train_epochs.png": training_plots.epochs, "train_cost.png": training_plots.cost},
    }
    sections = [_section(run, draw[run.kind]) for run in find_runs(directory, KINDS)]
    for section in sections:
        for name, png in section.images.items():
            write_atomic(directory / name, png)
    page = directory / "report.html"
    write_atomic(page, render(directory.resolve().name, sections))
    return page


def _section(run: Run, draw: dict[str, Callable[[Run], bytes]]) -> Section:
    try:
        return Section.of(run, {name: function(run) for name, function in draw.items()})
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{str(run.directory / TRACE)!r} is not a trace of {run.kind} ({type(error).__name__}: {error}); "
            "was it edited or written by another version?"
        ) from error
