"""One process holds a run directory; with its death it is free, whoever it started."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asvit_fast import folder_lock
from asvit_fast.errors import InputError
from asvit_fast.folder_lock import FolderLock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["asvit_fast.search"])


def hold_with_children(folder: str) -> None:
    """Holds the lock, with a forked child (as data workers are) and a program, until it is killed."""
    lock = FolderLock(Path(folder))
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    (Path(folder) / "children.tmp").write_text(f"{child} {program.pid}")
    (Path(folder) / "children.tmp").rename(Path(folder) / "children")
    time.sleep(60)
    lock.release()


def hold_without_system_locks(folder: str) -> None:
    fcntl.flock = without_locks
    hold_with_children(folder)


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("hold", [hold_with_children, hold_without_system_locks])
def test_a_kill_frees_the_folder_at_once(tmp_path: Path, hold: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if hold is hold_without_system_locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    process = CONTEXT.Process(target=hold, args=(str(tmp_path),))
    process.start()
    note = tmp_path / "children"
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(number) for number in note.read_text().split()]
    try:
        with pytest.raises(InputError, match="in use by another process"):
            FolderLock(tmp_path)
        process.kill()
        process.join()
        for child in children:
            os.kill(child, 0)  # they live
        FolderLock(tmp_path).release()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("system_locks", [True, False])
def test_one_holder_in_a_process(tmp_path: Path, system_locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not system_locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    first = FolderLock(tmp_path)
    with pytest.raises(InputError, match="in use by another process"):
        FolderLock(tmp_path)
    child = os.fork()
    if not child:
        first.release()  # as when an error leaves a block of the parent's
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InputError, match="in use by another process"):
        FolderLock(tmp_path)
    first.release()
    first.release()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"pid": 2**22 + 1}, True),  # above the largest process number
        ({"started": "1"}, True),  # the number belongs to another process now
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"boot": "another container", "pid": 2**22 + 1}, False),
        ({"pid": None}, False),
        ({}, False),
    ],
)
def test_owner_file(tmp_path: Path, change: dict, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    owner = tmp_path / ".owner"
    owner.write_text(json.dumps({**folder_lock._identity(os.getpid()), **change}))
    before = owner.read_text()
    if free:
        FolderLock(tmp_path).release()
        assert not owner.exists()
        return
    with pytest.raises(InputError, match=r"if it has ended, delete .*\.owner") as caught:
        FolderLock(tmp_path)
    assert "\n" not in str(caught.value)
    assert owner.read_text() == before
