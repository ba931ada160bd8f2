"""Tile choices are data: tiles/<family>.json has rows per kernel, looked up by the nearest shape; a table that
`asvit-fast tune` made for a GPU goes before it. Nothing is tuned while a model runs.

A row's names are features of a shape ("bits" of an element, "tokens", "pixels", "block_d", ...), which a look-up gives,
and options of a launch: other "block_*", "num_warps", "num_stages". "tuned" says where a row comes from. A feature that
a row does not have makes no difference to it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

Row = dict[str, Any]
Table = dict[str, list[Row]]  # rows of each kernel

FOLDER = "ASVIT_FAST_TILES"  # environment variable: where the tables of this machine's GPUs are
FAMILIES = {"80": "ampere", "90": "hopper", "100": "blackwell"}  # by the first compute capability
# of a distance, else 1: how wide a tile is decides more than how many tiles; kernels of three axes are other kernels
WEIGHTS = {"bits": 16.0, "block_d": 4.0, "axes": 16.0}
WIDTHS = ("bits", "block_d")
_COMMENTS = ("tuned",)
_trial: dict[str, Row] = {}  # by kernel, inside `trying`
_assumed = "hopper"
_decisions: list[Any] = []  # caches of `once_per_shape`


class TileTableError(ValueError):
    """A table that cannot be used; the message names the file."""


def block(size: int) -> int:
    """The tile that holds `size`: a power of two, and at least what tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def once_per_shape(function: Callable[..., Any]) -> Any:
    """Cache what depends on shapes, types, devices and tiles; the cache is emptied when the tiles change."""
    cached = functools.lru_cache(maxsize=1024)(function)
    _decisions.append(cached)
    return cached


def _forget_decisions() -> None:
    for decision in _decisions:
        decision.cache_clear()


# --------------------------------------------------------------------------- tables


@once_per_shape
def family_of(device: torch.device) -> str:
    """Whose tables a device uses, "family/name of the GPU": hopper, blackwell (datacenter), else ampere, whose tensor
    core instructions all others have; without a GPU it is hopper, or the one of `assuming`."""
    if device.type != "cuda":
        return _assumed
    family = {9: "hopper", 10: "blackwell"}.get(torch.cuda.get_device_capability(device)[0], "ampere")
    return f"{family}/{torch.cuda.get_device_name(device)}"


@contextlib.contextmanager
def assuming(family: str) -> Iterator[None]:
    """Devices other than GPUs are of `family` inside the block: for compiling what such a GPU would run."""
    global _assumed
    before, _assumed = _assumed, family
    _forget_decisions()
    try:
        yield
    finally:
        _assumed = before
        _forget_decisions()


def user_folder() -> Path:
    """The folder of tables of this machine's GPUs: ASVIT_FAST_TILES, or the user's cache folder."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER]).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "asvit_fast" / "tiles"


def user_table(gpu: str) -> Path:
    """The table of the GPU of that name, which need not exist."""
    return user_folder() / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def read_table(path: Path) -> Table:
    """Rows of each kernel. Raises TileTableError, which names the file, for anything else."""
    try:
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        rows = [row for kernel in kernels.values() for row in kernel]
        wrong = [row for row in rows if not _is_row(row)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if not wrong:
            return kernels
        reason = f"the row {wrong[0]} is not whole numbers above 0 with bits, num_warps and num_stages"
    raise TileTableError(f"table of tiles {path} cannot be used, repair or delete it ({reason})")


def _is_row(row: Row) -> bool:
    values = [value for name, value in row.items() if name not in _COMMENTS]
    return {"bits", "num_warps", "num_stages"} <= set(row) and all(type(value) is int and value > 0 for value in values)


@functools.cache
def _tables(family: str) -> tuple[Table, ...]:
    """The tables of "family" or "family/GPU", the one that goes first first."""
    name, _, gpu = family.partition("/")
    shipped = read_table(Path(__file__).with_name("tiles") / f"{FAMILIES.get(name, name)}.json")
    path = user_table(gpu) if gpu else None
    return (read_table(path), shipped) if path is not None and path.exists() else (shipped,)


def forget() -> None:
    """Forget what was read and looked up: the next look-up reads the files again."""
    _tables.cache_clear()
    _nearest.cache_clear()
    _forget_decisions()


# --------------------------------------------------------------------------- look-up


def nearest(kernel: str, family: str, **features: int) -> Row:
    """Options of the row whose features are nearest, on a logarithmic scale; where tables lack something, a rule.

    Args:
        kernel: name of the rows.
        family: of `family_of`, or of FAMILIES, whose shipped table it is then.
        features: "bits" of an element and what else the kernel's rows are told apart by, e.g. tokens=49, block_d=32.

    Returns:
        "block_*", "num_warps" and "num_stages" of the row. Blocks are halved, or warps doubled, where elements or rows
        of a tile are wider ("bits", "block_d") than the table's. A kernel without rows for the family has another's.
    """
    return dict(_trial[kernel] if kernel in _trial else _nearest(kernel, family, tuple(features.items())))


@functools.cache
def _nearest(kernel: str, family: str, items: tuple[tuple[str, int], ...]) -> Row:
    features = dict(items)

    def distance(row: Row) -> float:
        pairs = ((name, row.get(name, value), value) for name, value in items)
        return sum(WEIGHTS.get(name, 1.0) * abs(math.log2(known / value)) for name, known, value in pairs)

    for name in (family, *FAMILIES):
        rows = [row for table in _tables(name) for row in table.get(kernel, ())]
        if rows:
            break
    else:
        raise TileTableError(f"no table of tiles has rows of {kernel!r}: add some to kernels/tiles/hopper.json")
    row = min(rows, key=distance)  # of equals the first: the user's
    options = {name: row[name] for name in row if name.startswith(("block_", "num_")) and name not in features}
    for name in WIDTHS:
        if len({other.get(name) for other in rows}) > 1:  # else the kernel's tiles do not depend on it
            options = _smaller(options, features.get(name, 1) / row.get(name, math.inf))
    return options


def _smaller(options: Row, factor: float) -> Row:
    """As many bytes per tile as before where each row of it has `factor` times as many: the largest block is halved, or
    more warps share it where none is left to halve."""
    options = dict(options)
    while factor > 1:
        blocks = [name for name in options if name.startswith("block_") and options[name] > 16]
        if blocks:
            options[max(blocks, key=options.__getitem__)] //= 2
        else:
            options["num_warps"] = min(8, 2 * options["num_warps"])
        factor /= 2
    return options


@contextlib.contextmanager
def trying(kernel: str, options: Mapping[str, int]) -> Iterator[None]:
    """Every look-up of `kernel` finds `options` inside the block, as `nearest` returns them: for `asvit-fast tune`."""
    _trial[kernel] = dict(options)
    _forget_decisions()
    try:
        yield
    finally:
        del _trial[kernel]
        _forget_decisions()


def choose(kernel: str, family: str, **features: int) -> dict[str, Any]:
    """Tiles as a launch takes them: blocks are constants, in capitals; the other options are Triton's."""
    row = nearest(kernel, family, **features)
    options = {name.upper() if name.startswith("block_") else name: value for name, value in row.items()}
    # fusing multiplications and additions is wanted, and said: Triton's default changes between versions
    return options | {"enable_fp_fusion": True}
