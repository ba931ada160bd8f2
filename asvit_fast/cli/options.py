"""Options: how their text is read, and how defaults, a YAML file and the command line become one set of values."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from ..errors import InputError
from ..settings import LARGEST_SEED

Reader = Callable[[Any], Any]
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Option:
    """One option of a command. ``name`` is the one of the Python function; ``read`` takes text or a YAML value."""

    name: str
    read: Reader
    default: Any
    help: str
    metavar: str | None = None
    positional: bool = False
    required: bool = False
    flag: bool = False
    repeated: bool = False
    several: bool = False  # values that follow each other
    parameter: str = ""  # what Python calls it, where that is another name

    @property
    def label(self) -> str:
        """The name as the user writes it on the command line."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Command:
    """A subcommand and its options. ``run`` of the module of its name, imported when it is needed, does the work and
    returns the exit code; ``resumable`` work goes on where it was stopped."""

    name: str
    summary: str
    options: tuple[Option, ...]
    epilog: str = ""
    resumable: bool = False


# Readers: text from the command line or a value from YAML -> the value the Python functions take.


def text(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple, bool)) or value is None:
        raise InputError(f"expected text, got {value!r}")
    return str(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"expected true or false, got {value!r}")
    return value


def _parse(value: Any) -> float | int:
    """The finite number that text or a value is, exactly where it is whole."""
    try:
        if isinstance(value, bool):
            raise TypeError
        factor = 1
        if isinstance(value, str):
            digits = value.strip().lower()
            if digits[-1:] in _SUFFIXES:
                factor, digits = _SUFFIXES[digits[-1]], digits[:-1]
            value = int(digits) if digits.lstrip("+-").isdecimal() else float(digits)
        result = factor * (value if isinstance(value, int) else float(value))
        return int(result) if result == int(result) else result
    except (TypeError, ValueError, OverflowError):  # of infinity and NaN, too
        raise InputError(f"expected a number such as 1e6, 100M or 2.5G, got {value!r}") from None


def _numeric(holds: Callable[[float], bool], expected: str) -> Reader:
    """A reader of numbers that a condition holds for; ``1500``, ``1e6``, ``5M``, ``2.5G``; whole ones become int."""

    def read(value: Any) -> float | int:
        result = _parse(value)
        if not holds(result):
            raise InputError(f"expected {expected}, got {value!r}")
        return result

    return read


number = _numeric(lambda n: n >= 0, "a number that is finite and not negative")
positive = _numeric(lambda n: n > 0, "a number above 0")
fraction = _numeric(lambda n: 0 <= n < 1, "a number from 0 to below 1")


def integer(minimum: int, maximum: int | None = None) -> Reader:
    expected = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    most = math.inf if maximum is None else maximum
    return _numeric(lambda n: isinstance(n, int) and minimum <= n <= most, f"a whole number {expected}")


seed = integer(0, LARGEST_SEED)


def real(value: Any) -> float:
    return float(number(value))


def switch(value: Any) -> bool:
    """``true`` or ``false``, for what is on unless it is switched off."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise InputError(f"expected true or false, got {value!r}")
    return words[str(value).lower()]


def _parts(value: Any, separator: str = ",") -> Sequence[Any]:
    """Parts of a YAML list, or of text."""
    return value if isinstance(value, (list, tuple)) else text(value).split(separator)


def pair(value: Any) -> tuple[float, float]:
    """``0.08,1`` or a YAML pair."""
    parts = _parts(value)
    if len(parts) != 2:
        raise InputError(f"expected two numbers such as 0.08,1, got {value!r}")
    return real(parts[0]), real(parts[1])


def numbers(value: Any) -> tuple[float, ...]:
    """``0.5``, ``0.485,0.456,0.406``, ``["0.485", "0.456", "0.406"]`` or a YAML list."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(real(piece) for part in parts for piece in (part.split(",") if isinstance(part, str) else [part]))


def _assignments(value: Any, expected: str) -> dict[str, Any]:
    """``NAME=CONTENT``, given once or several times, or a YAML mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    pairs = {item: str(item).partition("=") for item in strings(value)}
    wrong = [item for item, (_, equals, _) in pairs.items() if not equals]
    if wrong:
        raise InputError(f"expected {expected}, got {wrong[0]!r}")
    return {name.strip(): content for name, _, content in pairs.values()}


def keywords(value: Any) -> dict[str, Any]:
    """``["attn_scale=true", "window_size=7"]`` or a YAML mapping; values are read as YAML."""
    result = _assignments(value, "NAME=VALUE such as attn_scale=true")
    if isinstance(value, Mapping):
        return result
    for name, content in result.items():
        try:
            result[name] = yaml.safe_load(content)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "not YAML"
            raise InputError(f"{name}: cannot read {content!r} ({problem})") from None
    return result


def choices_per_dimension(value: Any) -> dict[str, tuple[int, ...]]:
    """``["K1=8", "heads=16,32"]`` or a YAML mapping ``{K1: 8, heads: [16, 32]}``."""
    choices = _assignments(value, "NAME=CHOICES such as K1=8 or heads=16,32")
    read = integer(1)
    return {
        str(name): tuple(map(read, [items] if isinstance(items, int) else _parts(items)))
        for name, items in choices.items()
    }


def choice(*names: str) -> Reader:
    def read(value: Any) -> str:
        if value not in names:
            raise InputError(f"expected one of {', '.join(names)}; got {value!r}")
        return value

    return read


def listed(value: Any) -> tuple[str, ...]:
    """``a,b,c`` or a YAML list."""
    return tuple(text(part).strip() for part in _parts(value) if text(part).strip())


def subset(names: Sequence[str]) -> Reader:
    """A reader of some of ``names``: ``a,b`` or a YAML list."""

    def read(value: Any) -> tuple[str, ...]:
        found = listed(value)
        unknown = [name for name in found if name not in names]
        if unknown or not found:
            raise InputError(f"expected some of {', '.join(names)}; got {', '.join(unknown) or 'nothing'}")
        return found

    return read


def strings(value: Any) -> tuple[str, ...]:
    """Text that is given once or several times."""
    return tuple(text(item) for item in ([value] if isinstance(value, str) else value))


def batches(value: Any) -> tuple[int, ...]:
    """``1,8,64``, ``sweep`` (powers of two) or a YAML list."""
    if value == "sweep":
        return tuple(2**power for power in range(17))
    read = integer(1)
    return tuple(map(read, [value] if isinstance(value, int) else _parts(value)))


def image_size(value: Any) -> int | tuple[int, int]:
    """``224`` or ``224x160`` (height x width), pixels."""
    try:
        sides = tuple(int(part) for part in _parts(value.lower() if isinstance(value, str) else value, "x"))
    except (TypeError, ValueError):
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise InputError(f"expected pixels as a side (224) or height x width (224x160), got {value!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def bounds(value: Any, low: str = "1M", high: str = "10M") -> tuple[float | None, float | None]:
    """``1M:10M``, ``:10M``, ``1M:`` or a YAML pair -> (low, high); an open end is None. Examples are for the error."""
    parts = _parts(value, ":")
    if len(parts) != 2:
        raise InputError(f"expected LOW:HIGH such as {low}:{high}, :{high} or {low}:, got {value!r}")
    return _window(parts)


def milliseconds(value: Any) -> tuple[float | None, float | None]:
    """``5:20``, as ``bounds``."""
    return bounds(value, "5", "20")


def _window(parts: Sequence[Any]) -> tuple[float | None, float | None]:
    low, high = (None if part in ("", None) else number(part) for part in parts)
    if low is not None and high is not None and low > high:
        raise InputError(f"the low end {parts[0]} is above the high end {parts[1]}; swap them")
    return low, high


def limit(value: Any) -> float | tuple[float, float]:
    """``100M``, or ``80M:110M`` = stop at the first, never exceed the second."""
    if not isinstance(value, (list, tuple)) and ":" not in str(value):
        return number(value)
    low, high = bounds(value)
    if low is None or high is None:
        raise InputError(f"expected STOP_AT:NEVER_ABOVE such as 80M:110M, got {value!r}")
    return low, high


# From dataclasses of settings to options, and back.

_READERS: dict[str, tuple[Reader, str]] = {  # and metavar, by a field's annotation
    "int": (integer(0), "N"),
    "int | None": (integer(0), "N"),
    "float": (real, "X"),
    "float | None": (real, "X"),
    "float | tuple[float, float]": (limit, "NUMBER"),
    "str": (text, "TEXT"),
    "str | torch.device | None": (text, "NAME"),
    "int | tuple[int, int]": (image_size, "PIXELS"),
    "int | tuple[int, int] | None": (image_size, "PIXELS"),
    "tuple[int, ...]": (batches, "NUMBERS"),
    "tuple[float, float]": (pair, "X,Y"),
    "tuple[float, ...] | None": (numbers, "X"),
    "tuple[str, ...]": (listed, "NAMES"),
}


def options_of(settings: type) -> tuple[Option, ...]:
    """An option for each field of a dataclass: its name, default, and ``help`` of its metadata."""
    return tuple(map(_option_of, fields(settings)))


def _option_of(field: Field[Any]) -> Option:
    limits, repeated = field.metadata, bool(field.metadata.get("repeated"))
    read: Reader
    metavar: str | None
    if field.type == "bool":
        read, metavar = (switch, "true|false") if field.default else (flag, None)
    elif repeated:
        read, metavar = strings, "NAME"
    elif "choices" in limits and str(field.type).startswith("str"):
        read, metavar = choice(*limits["choices"]), "NAME"
    elif "choices" in limits:
        read, metavar = subset(limits["choices"]), "NAMES"
    else:
        read, metavar = _READERS[str(field.type)]
    if field.name == "seed":
        read = seed
    elif "minimum" in limits and read is not batches:
        read = integer(limits["minimum"])
    elif "above" in limits or "below" in limits:
        read = positive if "above" in limits else fraction
    option = Option(field.name, read, field.default, limits["help"], metavar)
    return replace(option, flag=read is flag, repeated=repeated, several=read is numbers)


def chosen(values: SimpleNamespace, *settings: type) -> dict[str, Any]:
    """The values of all fields of dataclasses that a command has options for."""
    return {
        field.name: getattr(values, field.name)
        for one in settings
        for field in fields(one)
        if field.name in vars(values)
    }


# From three sources to one set of values.


def settings(command: Command, given: Mapping[str, Any], config: str | None) -> SimpleNamespace:
    """Defaults, then the YAML file, then what was given on the command line; every value read and checked."""
    from_file = {} if config is None else _read_config(command, config)
    values: dict[str, Any] = {}
    for option in command.options:
        values[option.name] = option.default
        if from_file.get(option.name) is not None:  # null in the file: the default
            values[option.name] = _read(option, from_file[option.name], f"config file {config!r}: {option.name}")
        if option.name in given:
            values[option.name] = _read(option, given[option.name], option.label)
    return SimpleNamespace(**values)


def require(command: Command, values: SimpleNamespace) -> None:
    """Raise InputError for a required option that nobody gave."""
    missing = [option.label for option in command.options if option.required and getattr(values, option.name) is None]
    if missing:
        raise InputError(f"{command.name} needs {', '.join(missing)}; see asvit-fast {command.name} --help")


def _read(option: Option, value: Any, label: str) -> Any:
    try:
        return option.read(value)
    except InputError as error:
        raise InputError(f"{label}: {error}") from None


def _read_config(command: Command, path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError, as is text that is not UTF-8
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"--config: {path!r} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config file {path!r} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"config file {path!r} must hold 'option: value' lines, got {type(content).__name__}")
    config = {str(key).replace("-", "_"): value for key, value in content.items()}
    known = [option.name for option in command.options]
    hints = [
        f"{key!r} (did you mean {difflib.get_close_matches(key, known, 1, 0.0)[0]!r}?)"
        for key in config
        if key not in known
    ]
    if hints:
        raise InputError(f"config file {path!r}: {command.name} has no option {', '.join(hints)}")
    return config


def to_yaml(command: Command, values: SimpleNamespace) -> str:
    """The effective configuration, as ``--config`` reads it back."""
    plain = json.dumps({option.name: getattr(values, option.name) for option in command.options})  # lists for tuples
    return f"# asvit-fast {command.name} --config FILE\n" + yaml.safe_dump(json.loads(plain), sort_keys=False)
