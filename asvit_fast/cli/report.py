"""``asvit-fast report``: plots and one HTML page of a run."""

from __future__ import annotations

from types import SimpleNamespace

from .options import Command, Option, text


def run(values: SimpleNamespace) -> int:
    from ..report import report

    print(report(values.directory))
    return 0


COMMAND = Command(
    name="report",
    summary="Draw a run: PNG plots and one self-contained report.html inside its directory; prints the page's path.",
    options=(
        Option(
            "directory",
            text,
            None,
            "run directory of search, scale or train, or one that holds them as search/, scale/ and train/",
            positional=True,
            required=True,
        ),
    ),
    run=run,
    epilog="example: asvit-fast report runs/search",
)
