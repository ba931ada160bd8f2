"""Reading back what a run wrote: the trace is the truth, so every field of it is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError
from ..files import as_float, from_json, to_json
from ..run_directory import RunDirectory
from .evaluation import METRICS, Measures

_NON_FINITE = ("inf", "-inf", "nan")  # as to_json writes them
_UNREPEATABLE = {"seconds", "dropped"}  # the time a step took; what a larger limit words differently
_TOLERANCE = 1e-9  # relative: another processor may round the last digit differently


def measures_of(record: Mapping[str, Any]) -> Measures:
    """The measures of a record of a trace. Raises InputError when they are not numbers."""
    return Measures(*(_number(record, name) for name in METRICS))


def seconds_of(record: Mapping[str, Any]) -> float:
    """The time a step took. Raises InputError when that is not a number of seconds."""
    seconds = _number(record, "seconds")
    if not 0 <= seconds < math.inf:
        raise InputError(f"seconds is {seconds}")
    return seconds


def difference(stored: Any, own: Any) -> str | None:
    """The place where a record differs from what this program would have written, or None; times are not compared."""
    if not isinstance(stored, Mapping):
        return f"is {_short(stored)} instead of a record"
    own = from_json(to_json(own))  # as it would be read back
    for name in {**own, **stored}:
        if name in _UNREPEATABLE:
            continue
        if name not in stored:
            return f"has no {name}"
        if name not in own:
            return f"has {name} {_short(stored[name])}, which no such record has"
        if not _agree(stored[name], own[name]):
            return f"has {name} {_short(stored[name])} instead of {_short(own[name])}"
    return None


def check_trace(directory: RunDirectory, repeat: Callable[[int, Measures, float], dict[str, Any]]) -> None:
    """Go through the steps on record: ``repeat(step, measures, seconds)`` is the record that the run makes of them.

    Raises InputError, naming the line, where the record is another one.
    """
    for step, record in enumerate(directory.trace):
        try:
            reason = difference(record, repeat(step, measures_of(record), seconds_of(record)))
        except InputError as error:
            reason = str(error)
        if reason:
            raise directory.damaged_line(step, reason)


def with_floats(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the measures as floats, which JSON holds as strings when they are not finite."""
    return {**record, **{name: as_float(record[name]) for name in METRICS}}


def _agree(stored: Any, own: Any) -> bool:
    if isinstance(own, float) and isinstance(stored, (int, float)) and not isinstance(stored, bool):
        return math.isclose(stored, own, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    if isinstance(own, dict):
        return difference(stored, own) is None
    if isinstance(own, list) and isinstance(stored, list):
        return len(stored) == len(own) and all(map(_agree, stored, own))
    return type(stored) is type(own) and stored == own


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in _NON_FINITE):
        raise InputError(f"has {name} {_short(value)} instead of a number")
    return as_float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
