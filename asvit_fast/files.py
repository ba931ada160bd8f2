"""Files that survive a kill or a full disk: atomic writes, strict JSON, append-only JSON lines."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import math
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


@contextlib.contextmanager
def file_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError (read-only or full disk, missing folder, no permission) into one line that names the path."""
    try:
        yield
    except OSError as error:
        reason, advice = error.strerror or str(error), "choose another path"
        advice = advice if verb == "read" else f"free space or {advice}"
        raise InputError(f"cannot {verb} {path}: {reason}; {advice}") from error


def folder_path(folder: str | os.PathLike[str], name: str = "out") -> Path:
    """The path of a folder that is to be written; the option is called ``name``.

    Raises InputError for what names no folder: no path, empty text (pathlib would take the working directory), or with
    a NUL.
    """
    if not isinstance(folder, (str, bytes, os.PathLike)):
        raise InputError(f"{name} must name a folder, got {folder!r}; give a path such as runs/first")
    text = os.fspath(folder)
    if not text or "\0" in os.fsdecode(text):
        raise InputError(f"{name} must name a folder, got {text!r}; give a path such as runs/first")
    return Path(os.fsdecode(text))


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview | str) -> None:
    """Write ``data`` (text as UTF-8) so that ``path`` holds either its old content or all of the new, never a part.

    The data reaches the disk in a temporary file of the same folder, which then replaces ``path`` in one step. The
    file keeps its mode; a new one has that of any new file. Raises InputError when writing is not possible; what was
    there is then untouched.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with file_errors("write", path):
        temporary = _scratch(path)
        try:
            with open(temporary, "xb") as file:  # made as any file is: the system applies the umask
                file.write(content)
            replace_file(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def checksums_fit(path: str | os.PathLike[str]) -> bool:
    """Whether a file of ``torch.save`` is whole: ``torch.load`` does not look at its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def replace_file(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Put a finished file in the place of ``path``, in one step and durably.

    It gets the mode of ``path``, or that of any new file: libraries that write through ``tempfile`` make files that
    only their owner can read. Raises OSError.
    """
    temporary, path = Path(temporary), Path(path)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else _mode_of_new_files(path)
    if stat.S_IMODE(temporary.stat().st_mode) != mode:
        os.chmod(temporary, mode)
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], None], last: str) -> None:
    """Write a folder so that ``path`` holds either all that it held or all of the new, never a mixture.

    Args:
        path: the folder, new or there; files of it that the new one has not stay.
        fill: writes the files into the empty folder that it is given.
        last: name of the file without which the folder is none. Where folders cannot be exchanged in one step (other
            systems than Linux, the current folder, a mount point), it goes first and comes last.

    Raises:
        InputError: the folder cannot be written; what was there is then untouched.
    """
    target = Path(os.path.realpath(path))
    with file_errors("write", Path(path)), contextlib.ExitStack() as cleanup:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target.parent if os.access(target.parent, os.W_OK) else target
        for leftover in place.glob(f".{glob.escape(target.name)}.*.tmp"):  # of a process killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = place / f".{target.name}.{os.getpid()}.tmp"
        scratch.mkdir()
        cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
        fill(scratch)
        for file in scratch.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if target.is_dir():
            for file in target.iterdir():
                if file.is_file() and not (scratch / file.name).exists():
                    shutil.copy2(file, scratch / file.name)
            shutil.copymode(target, scratch)
        if not _put_folder(scratch, target):
            target.mkdir(exist_ok=True)
            (target / last).unlink(missing_ok=True)
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == last):
                os.replace(file, target / file.name)
        _sync_folder(target)
        _sync_folder(target.parent)


def _put_folder(scratch: Path, target: Path) -> bool:
    """One folder in the place of another in one step; False where that cannot be done."""
    if scratch.parent == target or target == Path.cwd():
        return False
    if not target.exists():
        os.rename(scratch, target)
        return True
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(scratch), here, os.fsencode(target), exchange) == 0


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON; the floats that JSON cannot hold become the strings "inf", "-inf" and "nan" (see ``as_float``)."""
    return json.dumps(_without_non_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def from_json(text: str | bytes) -> Any:
    """The value of a strict JSON text. Raises InputError for anything else, bare NaN and Infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise InputError("not valid JSON: nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} when there is none, or something else."""
    try:
        content = from_json(path.read_bytes())
    except (OSError, InputError):
        return {}
    return content if isinstance(content, dict) else {}


def as_float(value: float | str) -> float:
    """The float that ``to_json`` wrote: undoes "inf", "-inf" and "nan". Raises InputError for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"expected a number in a run's files, found {value!r}: one of them is damaged") from None


def append_jsonl(path: str | os.PathLike[str], record: Any) -> None:
    """Append one record as one line and wait until it is on the disk.

    A torn last line (a kill in the middle of an earlier append) is cut off first. When the write fails, the file is
    cut back to what it held before, and InputError says why.
    """
    path = Path(path)
    line = to_json(record).encode() + b"\n"
    with file_errors("append to", path):
        created = not path.exists()
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                complete = _complete_size(path)
                if complete < size:
                    file.truncate(complete)
                    size = complete
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        if created:
            _sync_folder(path.parent)


def read_jsonl(path: str | os.PathLike[str]) -> list[Any]:
    """All complete records of the file, [] when there is none; a torn last line is ignored.

    Raises InputError, naming the line, when a complete line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    with file_errors("read", path):
        content = path.read_bytes()
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            records.append(from_json(line))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return records


def _complete_size(path: Path) -> int:
    """Bytes up to and including the last newline."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return file.tell()
        file.seek(0)
        return file.read().rfind(b"\n") + 1


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _scratch(path: Path) -> Path:
    """A name beside ``path`` that nobody has; what a kill leaves under it is removed by ``remove_leftovers``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what processes left behind that were killed while they wrote ``path``."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _mode_of_new_files(path: Path) -> int:
    """Permissions of a file made beside ``path`` now. Asking for the umask would change it for all threads."""
    probe = _scratch(path)
    with open(probe, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    os.unlink(probe)
    return mode


def _sync_folder(folder: Path) -> None:
    """Make a rename or a new name durable, where the system can open a folder (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
