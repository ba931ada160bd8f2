"""The folder of a run: what it is, what it did, where it stands. A kill at any moment loses one step at most."""

from __future__ import annotations

import datetime
import io
import os
import platform
import shlex
import sys
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .errors import InputError
from .files import (
    append_jsonl,
    as_float,
    checksums_fit,
    folder_path,
    from_json,
    read_jsonl,
    remove_leftovers,
    to_json,
    write_atomic,
)
from .folder_lock import FolderLock
from .machine import processor

CONFIG, TRACE, STATE, RESULT, STARTS = "config.json", "trace.jsonl", "state.pt", "result.json", "starts.jsonl"
AP_MEASURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # of a detector's validation
MASK, AVERAGE = "mask_", "ema_"  # what names of measures begin with, of masks and of averaged weights
BASELINE = "baseline"  # the folder of its random search inside that of a search
_LINES = "trace_lines"  # of the state: how much of the trace it accounts for
_CHANGES = "changes"  # of the configuration: which options were changed after which step
_CHANGED = "changed"  # of a line of the trace: the options that were changed before it


class DamagedState(InputError):
    """A file that cannot be read as the state of a run."""


class RunDirectory:
    """``config.json`` (options), ``trace.jsonl`` (one line a step), the state (how to go on), ``result.json``.

    A step first appends to the trace, then replaces the state; the state knows how many lines of the trace it accounts
    for, and lines beyond that are cut off when the run continues. ``starts.jsonl`` has a line for each process that
    did a step: date, command line, machine, versions. With ``out=None`` everything stays in memory.

    Use as a context manager: it holds a lock, so that two processes never write into one folder.

    Args:
        out: the folder, made if missing.
        config: all options that the result depends on, and "kind". The package's version is added; a folder begun by
            another version is continued with a warning.
        state_file: name of the file that holds the state, a dict that ``torch.save`` takes; None: the trace is all
            there is.
        changeable: options of ``config`` with which a run may be continued though it was begun with other values. They
            are in ``changes`` (name: (value there, value here)); the caller decides from the trace what they mean, and
            calls ``accept_changes`` or ``refuse_changes`` before anything else is written.
        keeps: further files and folders that a run writes before its first step is on record. A folder that has neither
            them nor a step is begun anew, whatever options its configuration has.
        rebuilds: the caller can do without the state, from the trace alone. ``state`` is then None where the file is
            lost or damaged, and ``trace`` complete. Otherwise such a folder is refused, and nothing is cut off.

    Raises:
        InputError: the folder cannot be written, is in use, is damaged, or holds a run of another kind or other
            options.
    """

    def __init__(
        self,
        out: str | os.PathLike[str] | None,
        config: dict[str, Any],
        state_file: str | None = STATE,
        *,
        changeable: Collection[str] = (),
        keeps: Collection[str] = (),
        rebuilds: bool = False,
    ) -> None:
        self.path = None if out is None else folder_path(out)
        self.state_file, self.changeable, self.keeps, self.rebuilds = state_file, changeable, keeps, rebuilds
        self.config = from_json(to_json({**config, "version": __version__}))  # as it will be read: lists for tuples
        self.trace: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        self.result: dict[str, Any] | None = None
        self.changes: dict[str, tuple[Any, Any]] = {}
        self._noted_start = False
        self._lock: FolderLock | None = None
        if self.path is None:
            return
        self._check_apart_from_images(self.path)
        self._lock = self._acquire(self.path)
        try:
            self._open(self.path)
        except BaseException:
            self.close()
            raise

    def record(self, entry: dict[str, Any], state: dict[str, Any]) -> None:
        """A finished step: its trace entry and the state after it."""
        if self.path is not None:
            if not self._noted_start:  # a start that does nothing leaves the folder as it is
                append_jsonl(self.path / STARTS, _start_record())
                self._noted_start = True
            append_jsonl(self.path / TRACE, self._line(len(self.trace), entry))
        self.trace.append(entry)
        self.save(state)

    def save(self, state: dict[str, Any]) -> None:
        """The state after the steps recorded so far."""
        self.state = state
        if self.path is not None and self.state_file is not None:
            buffer = io.BytesIO()
            torch.save({**state, _LINES: len(self.trace)}, buffer)
            write_atomic(self.path / self.state_file, buffer.getbuffer())

    def finish(self, result: dict[str, Any]) -> None:
        self.result = result
        if self.path is not None:
            write_atomic(self.path / RESULT, to_json(result, indent=2) + "\n")

    def accept_changes(self, trace: list[dict[str, Any]], state: dict[str, Any] | None) -> None:
        """Go on with the options given, from ``trace`` on: the first steps on record, as these options have them.

        An earlier result is dropped. A kill in between leaves a run of the old or of the new options.
        """
        assert self.path is not None
        (self.path / RESULT).unlink(missing_ok=True)
        self.result, self.trace = None, trace
        if state is not None:  # else nothing is on record yet
            self.save(state)  # from here on, the next opening cuts off what the trace has beyond these steps
        earlier = [{**change, "step": min(change["step"], len(trace))} for change in self.config.get(_CHANGES, [])]
        note = {"step": len(trace), **{name: list(values) for name, values in self.changes.items()}}
        self.config[_CHANGES] = [*earlier, note]
        lines = (to_json(self._line(step, record)) + "\n" for step, record in enumerate(trace))
        write_atomic(self.path / TRACE, "".join(lines))
        write_atomic(self.path / CONFIG, to_json(self.config, indent=2) + "\n")
        self.changes = {}

    def refuse_changes(self, reason: str) -> InputError:
        """The error that says why the run cannot go on with the options given."""
        return InputError(f"run directory {self.path} cannot go on: {reason} ({_differences(self.changes)})")

    def damaged(self, name: str, reason: str) -> InputError:
        """The error that says what is wrong with a file of this run, which can be made again from the trace."""
        assert self.path is not None
        return InputError(f"{self.path / name} {reason}; delete it to have it made again from {TRACE}")

    def damaged_line(self, step: int, reason: str) -> InputError:
        """The error that says what is wrong with a step on record."""
        assert self.path is not None
        return InputError(
            f"{self.path / TRACE}, line {step + 1}: {reason}; restore it, or choose another run directory"
        )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_apart_from_images(self, path: Path) -> None:
        for name in ("data", "images"):
            source = self.config.get(name)
            if isinstance(source, str) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(source)):
                raise InputError(f"run directory {path} is in the folder of the images, {source}; choose another")

    def _acquire(self, path: Path) -> FolderLock:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # the only proof that the folder takes new files
                pass
            return FolderLock(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"run directory {path} cannot be written: {reason}; choose another") from error

    def _open(self, path: Path) -> None:
        files = [name for name in (TRACE, self.state_file, RESULT) if name is not None]
        for name in (CONFIG, *files):
            remove_leftovers(path / name)
        present = [name for name in files if (path / name).exists()]
        stored = read_json(path / CONFIG) if (path / CONFIG).exists() else None
        of_this_kind = isinstance(stored, dict) and stored.get("kind") == self.config["kind"]
        if of_this_kind and not present and not any(map(_has_content, (path / name for name in self.keeps))):
            (path / CONFIG).unlink()  # of a start that was refused, or ended before its first step
        if not (path / CONFIG).exists():
            if present:
                raise InputError(f"run directory {path} has {present[0]} but no {CONFIG}; choose another")
            write_atomic(path / CONFIG, to_json(self.config, indent=2) + "\n")
            return
        self._compare(path, stored)
        if (path / RESULT).exists():
            self.result = read_json(path / RESULT, "delete it, and the same command makes it again")
        self.trace = self._read_trace(path / TRACE)

    def _compare(self, path: Path, stored: Any) -> None:
        if not isinstance(stored, dict) or not isinstance(stored.get("kind"), str):
            raise InputError(f"{path / CONFIG} is not the configuration of a run; choose another run directory")
        if stored["kind"] != self.config["kind"]:
            raise InputError(
                f"run directory {path} holds a {stored['kind']} run, not a {self.config['kind']} run; choose another "
                "run directory"
            )
        version, changes = stored.pop("version", None), _checked_changes(path, stored.pop(_CHANGES, []))
        old, new = _flat(stored), _flat({name: value for name, value in self.config.items() if name != "version"})
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        different = {name: (old.get(name), new.get(name)) for name in names if not _same_path(name, old, new)}
        if not set(different) <= set(self.changeable):
            raise InputError(
                f"run directory {path} holds a run with other options: {_differences(different)}; give the options of "
                "that run, or another run directory"
            )
        if version != self.config["version"]:
            warnings.warn(f"{path} was begun by version {version}, this is {self.config['version']}", stacklevel=5)
        self.changes = different
        self.config |= {"version": version, **({_CHANGES: changes} if changes else {})}

    def _read_trace(self, path: Path) -> list[dict[str, Any]]:
        """The steps that the state accounts for; lines beyond them are cut off."""
        content = path.read_bytes() if path.exists() else b""
        complete = content.split(b"\n")[:-1]
        lines = self._read_state(len(complete))
        kept = b"".join(line + b"\n" for line in complete[:lines])
        if kept != content:
            write_atomic(path, kept)
        trace = read_jsonl(path)
        for step, record in enumerate(trace):
            if not isinstance(record, dict):
                raise self.damaged_line(step, "is not the record of a step")
            record.pop(_CHANGED, None)
        return trace

    def _read_state(self, complete: int) -> int:
        """The number of lines of the trace that the state accounts for: all, where the caller needs no state."""
        if self.path is None or self.state_file is None:
            return complete
        path = self.path / self.state_file
        try:
            if path.exists():
                self.state = load_state(path)
            elif complete > 1:
                raise DamagedState(f"{path} is missing")
            else:  # a kill may have come between the first line and the first state
                return complete if self.rebuilds else 0
        except DamagedState as error:
            if not self.rebuilds:
                raise InputError(
                    f"{error}, but {TRACE} has {complete} steps; restore it, or choose another run directory"
                ) from error
            warnings.warn(f"{error}: made again from the {complete} steps of {TRACE}", stacklevel=7)
            return complete
        lines = self.state.pop(_LINES)
        if lines > complete:
            raise InputError(
                f"{self.path / TRACE} has {complete} steps but {self.state_file} knows {lines}; choose another run "
                "directory"
            )
        return lines

    def _line(self, step: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The line of a step: its entry, and which options were changed right before it, {name: [old, new]}."""
        changed: dict[str, Any] = {}
        for change in self.config.get(_CHANGES, []):
            if change["step"] == step:
                for name, values in change.items():
                    if name != "step":
                        changed[name] = [changed.get(name, values)[0], values[1]]
        return {**entry, **({_CHANGED: changed} if changed else {})}


def load_state(path: Path) -> dict[str, Any]:
    """The state that ``RunDirectory.save`` wrote, on the CPU.

    Raises DamagedState when the file cannot be read, InputError when it holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedState(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # anything, in words about pickles and archives
        raise DamagedState(f"{path} is damaged: no state of a run, or cut short") from error
    if not checksums_fit(path):
        raise DamagedState(f"{path} is damaged: its checksums do not fit")
    lines = state.get(_LINES) if isinstance(state, dict) else None
    if type(lines) is not int or lines < 0:
        raise InputError(
            f"{path} is not the state of a run: {_LINES} must be a number of steps, got {lines!r}; restore it, delete "
            "it, or choose another run directory"
        )
    return state


def accuracy(row: Mapping[str, Any]) -> float | None:
    """Top-1, or AP of boxes, of the network or of its average in an epoch of a training, whichever is better; None
    where it was not validated."""
    values = [as_float(row[name]) for name in ("top1", "ema_top1", "ap", "ema_ap") if row.get(name) is not None]
    return max(values, default=None)


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the best epochs among those with the finest tokens so far: weights of a coarse phase do best on its
    grid, which nobody will use them on."""
    validated = [row for row in rows if accuracy(row) is not None]
    return max(validated, key=lambda row: (-row["token_reduction"], accuracy(row)), default=None)


def read_json(path: Path, advice: str = "restore it, or choose another run directory") -> Any:
    """The content of a JSON file of a run. Raises InputError, with the path and advice, when it cannot be read."""
    try:
        return from_json(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}; {advice}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _checked_changes(path: Path, changes: Any) -> list[dict[str, Any]]:
    if not isinstance(changes, list) or not all(
        isinstance(change, dict)
        and type(change.get("step")) is int
        and all(isinstance(pair, list) and len(pair) == 2 for name, pair in change.items() if name != "step")
        for change in changes
    ):
        raise InputError(f"{path / CONFIG}: {_CHANGES} is not a list of changed options; choose another run directory")
    return changes


def _same_path(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether an option that names the images names the same folder."""
    paths = old.get(name), new.get(name)
    return (
        name == "data" and all(isinstance(path, str) for path in paths) and len(set(map(os.path.realpath, paths))) == 1
    )


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _differences(changes: dict[str, tuple[Any, Any]]) -> str:
    names = {name: name.removeprefix("recipe.").removeprefix("space.") for name in changes}  # as the user gives them
    return ", ".join(f"{names[name]} is {to_json(a)} there and {to_json(b)} here" for name, (a, b) in changes.items())


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names, so that a difference is named exactly."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _start_record() -> dict[str, str]:
    """This start of the program: date, command line, machine and versions, as text."""
    program = Path(sys.argv[0]).name
    program = "asvit-fast" if program == "__main__.py" else program
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": shlex.join([program, *sys.argv[1:]]),
        "machine": "; ".join([processor(), *sorted(set(gpus))]),
        "versions": f"asvit_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
