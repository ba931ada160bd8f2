"""The folder of a run: what it is, what it did, where it stands. A kill at any moment loses one step at most."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .errors import InputError
from .files import append_jsonl, from_json, read_jsonl, to_json, write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG, TRACE, RESULT = "config.json", "trace.jsonl", "result.json"
_LOCK = ".lock"
_LINES = "trace_lines"  # of the state: how much of the trace it accounts for


class RunDirectory:
    """``config.json`` (options), ``trace.jsonl`` (one line a step), the state (how to go on), ``result.json``.

    A step first appends to the trace, then replaces the state; the state knows how many lines of the trace it accounts
    for, and lines beyond that are cut off when the run continues. With ``out=None`` everything stays in memory.

    Use as a context manager: it holds a lock, so that two processes never write into one folder.

    Args:
        out: the folder, made if missing.
        config: all options that the result depends on, and "kind". The package's version is added; a folder begun by
            another version is continued with a warning.
        state_file: name of the file that holds the state, a dict that ``torch.save`` takes.

    Raises:
        InputError: the folder cannot be written, is in use, is damaged, or holds a run of another kind or other
            options.
    """

    def __init__(
        self, out: str | os.PathLike[str] | None, config: dict[str, Any], state_file: str = "state.pt"
    ) -> None:
        self.path = None if out is None else Path(out)
        self.state_file = state_file
        self.config = from_json(to_json({**config, "version": _version()}))  # as it will be read back: lists for tuples
        self.trace: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        self.result: dict[str, Any] | None = None
        self._lock: int | None = None
        if self.path is None:
            return
        self._acquire(self.path)
        try:
            self._open(self.path)
        except BaseException:
            self.close()
            raise

    def record(self, entry: dict[str, Any], state: dict[str, Any]) -> None:
        """A finished step: its trace entry and the state after it."""
        self.trace.append(entry)
        if self.path is not None:
            append_jsonl(self.path / TRACE, entry)
        self.save(state)

    def save(self, state: dict[str, Any]) -> None:
        """The state after the steps recorded so far."""
        self.state = state
        if self.path is not None:
            buffer = io.BytesIO()
            torch.save({**state, _LINES: len(self.trace)}, buffer)
            write_atomic(self.path / self.state_file, buffer.getbuffer())

    def finish(self, result: dict[str, Any]) -> None:
        self.result = result
        if self.path is not None:
            write_atomic(self.path / RESULT, to_json(result, indent=2) + "\n")

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # releases the lock, as the death of the process does
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # the only proof that the folder takes new files
                pass
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"run directory {path} cannot be written: {reason}; choose another with out") from error
        if fcntl is None:
            warnings.warn("no file locks on this system: never run twice in one run directory", stacklevel=4)
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise InputError(f"run directory {path} is in use by another process; wait, or choose another") from error

    def _open(self, path: Path) -> None:
        for name in (CONFIG, TRACE, self.state_file, RESULT):
            for leftover in path.glob(f".{name}.*.tmp"):  # of a process killed while it wrote
                leftover.unlink()
        if not (path / CONFIG).exists():
            for name in (TRACE, self.state_file, RESULT):
                if (path / name).exists():
                    raise InputError(f"run directory {path} has {name} but no {CONFIG}; choose another")
            write_atomic(path / CONFIG, to_json(self.config, indent=2) + "\n")
            return
        self._compare(path, _read_json(path / CONFIG))
        if (path / RESULT).exists():
            self.result = _read_json(path / RESULT)
        lines = 0
        if (path / self.state_file).exists():
            self.state = load_state(path / self.state_file)
            lines = self.state.pop(_LINES)
        self.trace = self._read_trace(path / TRACE, lines)

    def _compare(self, path: Path, stored: Any) -> None:
        if not isinstance(stored, dict) or "kind" not in stored:
            raise InputError(f"{path / CONFIG} is not the configuration of a run; choose another run directory")
        old, new = _flat(stored), _flat(self.config)
        if old["kind"] != new["kind"]:
            raise InputError(f"run directory {path} holds a {old['kind']} run, not a {new['kind']} run; choose another")
        old_version, new_version = old.pop("version", None), new.pop("version", None)
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            differences = ", ".join(f"{n} is {to_json(old.get(n))} there and {to_json(new.get(n))} here" for n in names)
            raise InputError(f"run directory {path} holds a run with other options: {differences}; choose another")
        if old_version != new_version:
            warnings.warn(f"{path} was begun by version {old_version}, this is {new_version}", stacklevel=5)

    def _read_trace(self, path: Path, lines: int) -> list[dict[str, Any]]:
        content = path.read_bytes() if path.exists() else b""
        complete = content.split(b"\n")[:-1]
        if len(complete) < lines:
            raise InputError(
                f"{path} has {len(complete)} steps but {self.state_file} knows {lines}; choose another run directory"
            )
        kept = b"".join(line + b"\n" for line in complete[:lines])
        if kept != content:
            write_atomic(path, kept)
        return read_jsonl(path)


def load_state(path: Path) -> dict[str, Any]:
    """What ``RunDirectory.save`` wrote, on the CPU. Raises InputError when the file is not that."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state[_LINES]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged ({reason}); choose another run directory") from error
    return state


def _version() -> str:
    from ._version import __version__

    return __version__


def _read_json(path: Path) -> Any:
    try:
        return from_json(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}; choose another run directory") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names, so that a difference is named exactly."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
