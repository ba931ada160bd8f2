"""``asvit-fast report``: plots and one HTML page of a run."""

from __future__ import annotations

from types import SimpleNamespace

from ..report import report


def run(values: SimpleNamespace) -> int:
    print(report(values.directory))
    return 0
