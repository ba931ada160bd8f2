"""A lock on a folder: one process holds it and it ends with that process, whatever children live on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import warnings
import weakref
from pathlib import Path
from typing import Any

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, OWNER = ".lock", ".owner"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without locks
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Holds ``folder`` until ``release`` or the end of this process; a second holder is refused, in any process.

    The system's lock (flock) belongs to an open file, which forked children such as data workers would share and so
    keep after this process is killed: they close it as soon as they exist. Programs that are started do not inherit it.
    Network file systems pass the lock on to their server. Where there are no locks, a file names the process that holds
    the folder; it counts for as long as that process lives, and from another machine until somebody deletes it.

    Raises:
        InputError: the folder is in use.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owner_file: Path | None = None
        self._descriptor: int | None = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._acquire()
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def release(self) -> None:
        if self._owner_file is not None:
            with contextlib.suppress(OSError):
                self._owner_file.unlink()
            self._owner_file = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def forget(self) -> None:
        """Leave the lock to the parent, in a forked child."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._owner_file = None

    def _acquire(self) -> None:
        assert self._descriptor is not None
        if fcntl is None:
            warnings.warn("no file locks on this system: never run twice in one run directory", stacklevel=5)
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._claim()
            elif isinstance(error, (BlockingIOError, PermissionError)):
                raise self._in_use("another process") from None
            else:
                raise

    def _claim(self) -> None:
        """Make the file that names this process; take the place of one that no longer lives."""
        path = self.folder / OWNER
        owner = _read(path)
        if owner is not None and not _lives(owner):
            grave = path.with_name(f"{OWNER}.{secrets.token_hex(8)}")
            path.rename(grave)
            if _read(grave) != owner:  # somebody else was faster, and it is theirs
                grave.rename(path)
            grave.unlink(missing_ok=True)
        try:
            with open(path, "x") as file:
                json.dump(_identity(os.getpid()), file)
        except FileExistsError:
            owner = _read(path) or {}
            raise self._in_use(
                f"another process ({owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')}; if it "
                f"has ended, delete {path})"
            ) from None
        self._owner_file = path

    def _in_use(self, by: str) -> InputError:
        return InputError(f"run directory {self.folder} is in use by {by}; wait, or choose another")


def _identity(pid: int) -> dict[str, Any]:
    """Facts that tell a process from any other, also from one that later has its number."""
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def _boot() -> str:
    """The boot of this machine and the container within it, which has process numbers of its own; "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "" if unknown, or when it has ended and nobody has noticed."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else numbers[18]
    except (OSError, ValueError, IndexError):
        return ""


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process still exists; one of another machine or container, or whose file is torn, may."""
    pid = owner.get("pid")
    if type(pid) is not int or (owner.get("host"), owner.get("boot")) != (socket.gethostname(), _boot()):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return owner.get("started") == _started(pid)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _leave_to_parent() -> None:
    for lock in list(_held):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
