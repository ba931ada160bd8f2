"""Fields of files that come from anywhere: what a value must be, in code and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

Field = tuple[Callable[[Any], bool], str]  # whether a value fits, and what is expected


def fits(value: Any, field: Field) -> bool:
    """Return whether a value is what the field must hold; never raises."""
    try:
        return field[0](value)
    except (RecursionError, OverflowError):  # a list inside itself, a number beyond any float
        return False


def shown(value: Any) -> str:
    """A value in a message: one line, not long."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested, or with more digits, than Python prints
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]} ..."


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    return is_whole(value, 1)


def is_list(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    """A list or tuple, of ``length`` if one is given, of what ``holds``."""
    return isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(holds, value))


def is_size(value: Any) -> bool:
    """A side, or height and width, in pixels."""
    return is_positive(value) or is_list(value, is_positive, 2)


def is_plain(value: Any) -> bool:
    """Numbers, text and lists and mappings of them: what JSON holds."""
    if isinstance(value, Mapping):
        return all(map(is_text, value)) and all(map(is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str)) or is_list(value, is_plain)


TEXT: Field = is_text, "text"


def whole(least: int) -> Field:
    return lambda value: is_whole(value, least), f"a whole number of at least {least}"


def one_of(choices: Collection[str]) -> Field:
    return lambda value: is_text(value) and value in choices, f"one of {', '.join(choices)}"
