"""A run that is killed with SIGKILL, wherever, and started again ends as if it had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from search_program import RUN, measures, run_search

from asvit_fast.errors import InputError
from asvit_fast.search import RunDirectory, search

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, str(Path(__file__).with_name("search_program.py"))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict]:
    return {kind: json.loads(json.dumps(run(None, measures))) for kind, run in RUN.items() if kind != "real"}


def finish(kind: str, out: Path) -> dict:
    return json.loads(json.dumps(RUN[kind](str(out), measures)))


@pytest.mark.parametrize(("kind", "call"), [("search", 1), ("search", 17), ("search", 31), ("scale", 40)])
def test_killed_while_scoring(tmp_path: Path, uninterrupted: dict, kind: str, call: int) -> None:
    command = [*PROGRAM, kind, str(tmp_path), "--kill-at", str(call)]
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert finish(kind, tmp_path) == uninterrupted[kind]


def test_killed_again_and_again_from_outside(tmp_path: Path, uninterrupted: dict) -> None:
    generator = random.Random(0)
    killed = 0
    for _ in range(4):
        command = [*PROGRAM, "search", str(tmp_path), "--sleep", "0.02"]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        lines = _lines(tmp_path)
        while _lines(tmp_path) == lines and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)  # wait until it works, then hit it anywhere within the next steps
        time.sleep(generator.uniform(0, 0.15))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    assert finish("search", tmp_path) == uninterrupted["search"]


def _lines(folder: Path) -> int:
    trace = folder / "trace.jsonl"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


KILL_IN_WRITE = """
import os, signal, sys
from asvit_fast.search import run_directory
from search_program import measures, run_search

point, count = sys.argv[2], int(sys.argv[3])
calls = {"append": 0, "state": 0, "replace": 0}

def counted(name, function, before):
    def call(*arguments, **options):
        calls[name] += 1
        last = name == point and calls[name] == count
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

run_directory.append_jsonl = counted("append", run_directory.append_jsonl, before=False)  # trace written, state not
run_directory.write_atomic = counted("state", run_directory.write_atomic, before=False)  # both written
os.replace = counted("replace", os.replace, before=True)  # temporary file written, not yet in place
run_search(sys.argv[1], measures)
"""


@pytest.mark.parametrize(
    ("point", "count"),
    [("append", 1), ("append", 12), ("state", 9), ("replace", 1), ("replace", 20)],
)
def test_killed_between_trace_and_state(tmp_path: Path, uninterrupted: dict, point: str, count: int) -> None:
    command = [sys.executable, "-c", KILL_IN_WRITE, str(tmp_path), point, str(count)]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert finish("search", tmp_path) == uninterrupted["search"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_torn_and_surplus_lines_are_cut_off(tmp_path: Path, uninterrupted: dict) -> None:
    command = [*PROGRAM, "search", str(tmp_path), "--kill-at", "10"]
    subprocess.run(command, env=ENVIRONMENT, capture_output=True)
    with open(tmp_path / "trace.jsonl", "ab") as file:
        file.write(b'{"step": 9, "from": "a step whose state was never written"}\n{"step": 10, "to')
    assert finish("search", tmp_path) == uninterrupted["search"]
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 30


def test_missing_lines_are_damage(tmp_path: Path) -> None:
    subprocess.run([*PROGRAM, "search", str(tmp_path), "--kill-at", "10"], env=ENVIRONMENT, capture_output=True)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:3]))
    before = trace.read_bytes()
    with pytest.raises(InputError, match=r"has 3 steps but state.pt knows 9"):
        run_search(str(tmp_path), measures)
    assert trace.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"), [("state.pt", b"nonsense"), ("config.json", b"{"), ("config.json", b"[1]")]
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    run_search(str(tmp_path), measures, steps=3)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        run_search(str(tmp_path), measures, steps=3)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_bytes() == content


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    process = subprocess.Popen([*PROGRAM, "search", str(tmp_path), "--sleep", "0.5"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 60
        while not _lines(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match="in use by another process"):
            run_search(str(tmp_path), measures)
    finally:
        process.kill()
        process.wait()


def test_another_kind(tmp_path: Path) -> None:
    run_search(str(tmp_path), measures, steps=2)
    with pytest.raises(InputError, match="holds a search run, not a scale run"):
        RUN["scale"](str(tmp_path), measures)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trace.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"trace.jsonl but no config.json"):
        run_search(str(tmp_path / "other"), measures, steps=2)


def test_another_version_warns(tmp_path: Path) -> None:
    run_search(str(tmp_path), measures, steps=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": "0.0.0-other"}))
    with pytest.warns(UserWarning, match="0.0.0-other"):
        run_search(str(tmp_path), measures, steps=2)


def test_the_disk_fills_up(tmp_path: Path) -> None:
    """The step that cannot be written is lost, the run ends in one line, and goes on where it stood."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12000, resource.RLIM_INFINITY));"
        "from search_program import measures, run_search; run_search(sys.argv[1], measures)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert "InputError: cannot" in done.stderr.splitlines()[-1]
    assert str(tmp_path) in done.stderr.splitlines()[-1]
    whole = search(steps=_lines(tmp_path), scorer=measures, progress=False, device="cpu")
    assert whole.steps == _lines(tmp_path) > 3
    assert len(finish("search", tmp_path)["trace"]) == 30


def test_in_memory_and_state_round_trip(tmp_path: Path) -> None:
    config = {"kind": "search", "pair": (1, 2)}
    state = {"logits": torch.randn(3, dtype=torch.float64), "value": 0.1 + 0.2}
    with RunDirectory(None, config) as memory:
        memory.record({"step": 0}, state)
        assert memory.trace == [{"step": 0}]
    with RunDirectory(tmp_path, config) as directory:
        directory.record({"step": 0}, state)
    with RunDirectory(tmp_path, config) as directory:
        assert directory.trace == [{"step": 0}]
        assert torch.equal(directory.state["logits"], state["logits"])
        assert directory.state["value"] == state["value"]
