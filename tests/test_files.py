import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from asvit_fast.errors import InputError
from asvit_fast.files import append_jsonl, as_float, from_json, read_jsonl, replace_file, to_json, write_atomic

INF, NAN = float("inf"), float("nan")


def test_write_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "first ü")
    assert path.read_text(encoding="utf-8") == "first ü"
    path.chmod(0o640)
    write_atomic(str(path), b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_new_files_respect_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do files that a library made for their owner alone; and nothing else sees another umask meanwhile."""
    previous = os.umask(0o027)
    try:
        with monkeypatch.context() as forbidden:
            forbidden.setattr(os, "umask", lambda _: pytest.fail("the umask belongs to the whole process"))
            write_atomic(tmp_path / "file", b"")
            descriptor, private = tempfile.mkstemp(dir=tmp_path)
            os.close(descriptor)
            replace_file(private, tmp_path / "second")
    finally:
        os.umask(previous)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "file": 0o640,
        "second": 0o640,
    }


def test_unusable_paths_name_themselves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing" / "a.json", tmp_path / "file" / "a.json", "/proc/asvit.json"):
        for write in (lambda p: write_atomic(p, "x"), lambda p: append_jsonl(p, {})):
            with pytest.raises(InputError) as caught:
                write(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


FULL_DISK = """
import resource, sys
from asvit_fast.errors import InputError
from asvit_fast.files import append_jsonl, write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # every write beyond 4096 bytes of a file now fails
for write in (lambda: write_atomic(sys.argv[1], b"n" * 5000), lambda: append_jsonl(sys.argv[2], {"n": "n" * 5000})):
    try:
        write()
    except InputError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole", tmp_path / "lines"
    write_atomic(whole, b"old")
    append_jsonl(lines, {"old": 1})
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", FULL_DISK, str(whole), str(lines)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert str(whole) in first
    assert str(lines) in second
    assert whole.read_bytes() == b"old"
    assert lines.read_text() == '{"old": 1}\n'
    assert sorted(tmp_path.iterdir()) == [lines, whole]


def test_device_full() -> None:
    with pytest.raises(InputError, match="/dev/full: No space left"):
        append_jsonl("/dev/full", {"a": 1})


def test_json_is_strict_and_keeps_every_float() -> None:
    value = {"a": [1.5, INF, -INF, NAN], "b": {"c": (0.1 + 0.2, 5e-324)}, "d": None, "e": "ü"}
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail)["a"] == [1.5, "inf", "-inf", "nan"]
    back = from_json(text)
    assert back["b"]["c"] == [0.1 + 0.2, 5e-324]
    assert [as_float(number) for number in back["a"]][:3] == [1.5, INF, -INF]
    assert as_float(back["a"][3]) != as_float(back["a"][3])
    for bad in ("NaN", "[Infinity]", "{", ""):
        with pytest.raises(InputError, match="JSON"):
            from_json(bad)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert read_jsonl(path) == []
    for step in range(3):
        append_jsonl(path, {"step": step, "value": INF})
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2]
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "val')  # torn by a kill
    assert len(read_jsonl(path)) == 3
    append_jsonl(path, {"step": 3})
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2, 3]
    path.write_bytes(b'{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_jsonl(path)


def test_a_line_torn_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"st')
    append_jsonl(path, {"step": 0})
    assert read_jsonl(path) == [{"step": 0}]
