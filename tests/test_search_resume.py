"""A run that is killed with SIGKILL, wherever, and started again ends as if it had not been."""

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from search_program import RUN, measures, run_killed, run_killed_in_write, run_on_full_disk, run_search

from asvit_fast.errors import InputError
from asvit_fast.run_directory import RunDirectory
from asvit_fast.search import search

# Forked from one warm server: importing torch anew for every process would take most of the time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["asvit_fast.search"])


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def run_until_killed(function: Callable[..., None], *arguments: object) -> None:
    process = start(function, *arguments)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict]:
    return {kind: json.loads(json.dumps(run(None, measures))) for kind, run in RUN.items() if kind != "real"}


def finish(kind: str, out: Path) -> dict:
    return json.loads(json.dumps(RUN[kind](str(out), measures)))


@pytest.mark.parametrize(
    ("kind", "call"),
    [("search", 1), ("search", 2), ("search", 17), ("search", 31), ("scale", 1), ("scale", 5), ("scale", 40)],
)
def test_killed_while_scoring(tmp_path: Path, uninterrupted: dict, kind: str, call: int) -> None:
    run_until_killed(run_killed, kind, str(tmp_path), call)
    assert not (tmp_path / "result.json").exists()
    assert finish(kind, tmp_path) == uninterrupted[kind]


def test_killed_again_and_again_from_outside(tmp_path: Path, uninterrupted: dict) -> None:
    generator = random.Random(0)
    killed = 0
    for _ in range(8):
        process = start(run_killed, "search", str(tmp_path), 0, 0.02)
        deadline = time.monotonic() + 60
        lines = _lines(tmp_path)
        while _lines(tmp_path) == lines and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)  # wait until it works, then hit it anywhere within the next steps
        time.sleep(generator.uniform(0, 0.15))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 2
    assert finish("search", tmp_path) == uninterrupted["search"]


def _lines(folder: Path) -> int:
    trace = folder / "trace.jsonl"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


@pytest.mark.parametrize(
    ("point", "count"),
    [(point, count) for point in ("append", "write", "replace") for count in (1, 2, 12, 30)] + [("replace", 32)],
)
def test_killed_between_trace_and_state(tmp_path: Path, uninterrupted: dict, point: str, count: int) -> None:
    run_until_killed(run_killed_in_write, str(tmp_path), point, count)
    assert finish("search", tmp_path) == uninterrupted["search"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_torn_and_surplus_lines_are_cut_off(tmp_path: Path, uninterrupted: dict) -> None:
    run_until_killed(run_killed, "search", str(tmp_path), 10)
    with open(tmp_path / "trace.jsonl", "ab") as file:
        file.write(b'{"step": 9, "from": "a step whose state was never written"}\n{"step": 10, "to')
    assert finish("search", tmp_path) == uninterrupted["search"]
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 30


def test_missing_lines_are_damage(tmp_path: Path) -> None:
    run_until_killed(run_killed, "search", str(tmp_path), 10)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:3]))
    before = trace.read_bytes()
    with pytest.raises(InputError, match=r"has 3 steps but state.pt knows 9"):
        run_search(str(tmp_path), measures)
    assert trace.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b'{"kind": {}}'),
        ("trace.jsonl", b"1\n[]\n2\n"),
        ("result.json", b"{"),
        ("result.json", b"[]"),
        ("result.json", b'{"length_distortion": true}'),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    run_search(str(tmp_path), measures, steps=3)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        run_search(str(tmp_path), measures, steps=3)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_bytes() == content


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    process = start(run_killed, "search", str(tmp_path), 0, 0.5)
    try:
        deadline = time.monotonic() + 60
        while not _lines(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match="in use by another process"):
            run_search(str(tmp_path), measures)
    finally:
        process.kill()
        process.join()


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
    message = tmp_path / "message"
    process = start(run_on_full_disk, str(tmp_path / "run"), str(message))
    process.join()
    assert process.exitcode == 0
    assert str(tmp_path / "run") in message.read_text()
    assert "\n" not in message.read_text()
    tmp_path = tmp_path / "run"
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
