"""Runs that go on longer than planned, or without their state, end as if nothing had happened; all else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from search_program import SEED, measures

from asvit_fast import run_directory
from asvit_fast.errors import InputError
from asvit_fast.search import ScaleStep, SearchResult, scale, search
from asvit_fast.topology import Topology

QUIET = {"progress": False, "device": "cpu", "seed": 3}
Scorer = Callable[[Topology], dict[str, float]]


class Killed(BaseException):
    """Ends a run like a signal does."""


class Counting:
    """The scorer of the tests; ends the run at one of its calls."""

    def __init__(self, last: int = -1) -> None:
        self.calls, self.last = 0, last

    def __call__(self, topology: Topology) -> dict[str, float]:
        if self.calls == self.last:
            raise Killed
        self.calls += 1
        return measures(topology)


def run_search(out: Path | None, scorer: Scorer = measures, steps: int = 9, **options: Any) -> SearchResult:
    return search(steps=steps, scorer=scorer, out=out, **{**QUIET, **options})


def run_scale(out: Path | None, scorer: Scorer = measures, max_params: Any = 8e6, **options: Any) -> list[ScaleStep]:
    return scale(SEED, max_params=max_params, scorer=scorer, out=out, **{**QUIET, **options})


def outcome(run: SearchResult | list[ScaleStep]) -> Any:
    """All that a run gives but the times."""
    if isinstance(run, SearchResult):
        trace, rest = run.trace, [run.to_dict(), run.policy.logits.tolist()]
    else:
        trace, rest = [step.to_dict() for step in run], []
    return [[{name: value for name, value in record.items() if name != "seconds"} for record in trace], *rest]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def refuses(folder: Path, run: Callable[[Path], Any], *words: str) -> None:
    """One line that holds the words, and not a byte is changed."""
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert contents(folder) == before


# More steps, larger limits


@pytest.mark.parametrize("stop", [None, 4])
def test_a_longer_search(tmp_path: Path, stop: int | None) -> None:
    if stop is None:
        run_search(tmp_path, steps=6)
    else:
        with pytest.raises(Killed):
            run_search(tmp_path, Counting(stop), steps=6)
    scorer = Counting()
    assert outcome(run_search(tmp_path, scorer)) == outcome(run_search(None))
    begun = 6 if stop is None else stop
    assert scorer.calls == 9 - begun + 1  # and the result
    assert [line.get("changed") for line in lines(tmp_path)] == [
        {"steps": [6, 9]} if step == begun else None for step in range(9)
    ]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9
    before = contents(tmp_path)
    assert outcome(run_search(tmp_path, Counting(0))) == outcome(run_search(None))  # nothing is left to do
    assert contents(tmp_path) == before


def test_a_shorter_search(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_search(tmp_path, Counting(5))
    refuses(tmp_path, lambda out: run_search(out, steps=4), "steps is 9 there and 4 here", "5 steps are on record")
    assert outcome(run_search(tmp_path, steps=5)) == outcome(run_search(None, steps=5))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"max_params": 6e6}, {"max_params": 8e6}),
        ({"max_params": 3e6}, {"max_params": 8e6}),
        ({"max_params": 7.9e6}, {"max_params": 8e6}),
        ({"max_steps": 2}, {"max_steps": 4}),
        ({"max_steps": 2}, {}),
        ({"max_params": (4e6, 8e6)}, {}),
        ({"max_params": (4e6, 6e6)}, {"max_params": (5e6, 8e6)}),
        ({}, {"max_params": (7e6, 8e6)}),
        ({"convention": "reference", "max_params": 6e6}, {"convention": "reference"}),
    ],
)
@pytest.mark.parametrize("stop", [None, 24])
def test_a_larger_network(tmp_path: Path, before: dict, after: dict, stop: int | None) -> None:
    scorer = Counting(-1 if stop is None else stop)
    try:
        run_scale(tmp_path, scorer, **before)
    except Killed:
        assert stop is not None
    alone, further = Counting(), Counting()
    expected = outcome(run_scale(None, alone, **after))
    assert outcome(run_scale(tmp_path, further, **after)) == expected
    assert further.calls < alone.calls or scorer.calls == 0  # what is known is not scored again
    if before != after and further.calls:
        (note,) = json.loads((tmp_path / "config.json").read_text())["changes"]
        assert "max_params" in note or "max_steps" in note
        if note["step"] < len(expected[0]):
            assert [step for step, line in enumerate(lines(tmp_path)) if "changed" in line] == [note["step"]]
    assert outcome(run_scale(tmp_path, Counting(0), **after)) == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"max_params": 4e6}, "cannot go on: step 0 would have had 13 instead of 16 candidates"),
        ({"max_params": (3e6, 8e6)}, "ended after 1 steps, and 4 are on record"),
        ({"max_steps": 1}, "ended after 1 steps"),
        ({"seed": 4}, "seed is 3 there and 4 here"),
    ],
)
def test_a_smaller_network(tmp_path: Path, change: dict, word: str) -> None:
    run_scale(tmp_path, max_params=(8e6, 8e6))
    refuses(tmp_path, lambda out: run_scale(out, **change), word)


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """End the run right before or after its n-th access to the disk."""

    def install(number: int) -> None:
        accesses: Iterator[int] = iter(range(10**6))

        def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
            def access(*arguments: Any, **keywords: Any) -> Any:
                if next(accesses) == number:
                    raise Killed
                result = function(*arguments, **keywords)
                if next(accesses) == number:
                    raise Killed
                return result

            return access

        monkeypatch.setattr(run_directory, "write_atomic", wrapped(run_directory.write_atomic))
        monkeypatch.setattr(run_directory, "append_jsonl", wrapped(run_directory.append_jsonl))
        monkeypatch.setattr(Path, "unlink", wrapped(Path.unlink))

    return install


@pytest.mark.parametrize("number", range(0, 12))
@pytest.mark.parametrize("kind", ["search", "scale"])
def test_killed_while_the_options_change(
    tmp_path: Path, kind: str, number: int, kill_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be continued with the new options, and with the old ones as long as these are on record."""
    run: Callable[..., Any] = {"search": run_search, "scale": run_scale}[kind]
    old = {"search": {"steps": 5}, "scale": {"max_params": 6e6}}[kind]
    run(tmp_path / "run", **old)
    kill_at(number)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "back")
    name, value = next(iter(old.items()))
    if json.loads((tmp_path / "back" / "config.json").read_text())[name] in (value, [value, value]):
        assert outcome(run(tmp_path / "back", **old)) == outcome(run(None, **old))
    assert outcome(run(tmp_path / "run")) == outcome(run(None))


# Lost and damaged files


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "half"])
@pytest.mark.parametrize(("kind", "stop"), [("search", 7), ("search", 99), ("scale", 40), ("scale", 999)])
def test_a_lost_state(tmp_path: Path, kind: str, stop: int, content: Any) -> None:
    run: Callable[..., Any] = {"search": run_search, "scale": run_scale}[kind]
    if stop in (99, 999):
        run(tmp_path)
    else:
        with pytest.raises(Killed):
            run(tmp_path, Counting(stop))
    state, done = tmp_path / "state.pt", lines(tmp_path)
    whole = state.read_bytes()
    state.unlink()
    if content is not None:
        state.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.warns(UserWarning, match=rf"state.pt is (missing|damaged).* made again from the {len(done)} steps"):
        found = run(tmp_path, Counting(0) if stop in (99, 999) else measures)
    assert outcome(found) == outcome(run(None))
    assert lines(tmp_path)[: len(done)] == done
    assert torch.load(state, weights_only=True)["trace_lines"] == len(lines(tmp_path))


def test_other_runs_keep_their_trace_when_the_state_is_lost(tmp_path: Path) -> None:
    """A training cannot be made again from its trace: it says so, and cuts nothing off."""
    config = {"kind": "train"}
    with run_directory.RunDirectory(tmp_path, config, "last.pth.tar") as run:
        for step in range(3):
            run.record({"step": step}, {"weights": torch.zeros(2)})
    (tmp_path / "last.pth.tar").rename(tmp_path / "elsewhere")
    for damage in (lambda: None, lambda: (tmp_path / "last.pth.tar").write_bytes(b"PK")):
        damage()
        refuses(tmp_path, lambda out: run_directory.RunDirectory(out, config, "last.pth.tar"), "has 3 steps", "restore")
    (tmp_path / "elsewhere").replace(tmp_path / "last.pth.tar")
    with run_directory.RunDirectory(tmp_path, config, "last.pth.tar") as run:
        assert [record["step"] for record in run.trace] == [0, 1, 2]


@pytest.mark.parametrize("value", [-1, True, 1.0, "7", None, [7], torch.tensor(7)])
def test_a_state_with_a_wrong_number_of_lines(tmp_path: Path, value: Any) -> None:
    with pytest.raises(Killed):
        run_search(tmp_path, Counting(7))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "trace_lines": value}, tmp_path / "state.pt")
    refuses(tmp_path, run_search, "state.pt", "trace_lines", "delete it")
    (tmp_path / "state.pt").unlink()
    with pytest.warns(UserWarning, match="made again"):
        assert outcome(run_search(tmp_path)) == outcome(run_search(None))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("search", {"policy": None}),
        ("search", {"policy": {"logits": [0.0]}}),
        ("search", {"policy": {"logits": torch.zeros(42, dtype=torch.float64)}}),
        ("scale", {"scored": None}),
        ("scale", {"scored": [[1.0, 2.0]]}),
        ("scale", {"scored": {SEED: [1.0]}}),
        ("scale", {"scored": {SEED: [1.0, True]}}),
        ("scale", {"scored": {SEED: "12"}}),
    ],
)
def test_a_state_of_something_else(tmp_path: Path, kind: str, change: dict) -> None:
    run: Callable[..., Any] = {"search": run_search, "scale": run_scale}[kind]
    with pytest.raises(Killed):
        run(tmp_path, Counting(20 if kind == "scale" else 7))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, **change}, tmp_path / "state.pt")
    refuses(tmp_path, run, "state.pt", "delete it")


@pytest.mark.parametrize("wrong", [None, "x", -5, True, [], {}, 1e300])
@pytest.mark.parametrize("kind", ["search", "scale"])
def test_fields_of_the_trace(tmp_path: Path, kind: str, wrong: Any) -> None:
    """Whichever field of a step holds something else: the line is named (that of the reward, which a measure of the
    right type changes, may be a later one), and the result is never another."""
    run: Callable[..., Any] = {"search": run_search, "scale": run_scale}[kind]
    run(tmp_path)
    trace = lines(tmp_path)
    assert len(trace) > 2
    for name in trace[1]:
        if (wrong == 1e300 and name == "seconds") or wrong == trace[1][name] or name == "dropped":
            continue
        changed = [{**record, name: wrong} if step == 1 else record for step, record in enumerate(trace)]
        (tmp_path / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
        refuses(tmp_path, run, "trace.jsonl, line ")
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in trace))
    result = json.loads((tmp_path / "result.json").read_text())
    for name in set(result) - ({"length_distortion", "ntk_condition"} if wrong == -5 else set()):  # it is a number
        (tmp_path / "result.json").write_text(json.dumps({**result, name: wrong if wrong != 1e300 else [1]}))
        refuses(tmp_path, run, "result.json", "delete it")
    (tmp_path / "result.json").unlink()
    assert outcome(run(tmp_path)) == outcome(run(None))


@pytest.mark.parametrize("changes", [3, [3], [{"step": "x"}], [{"step": 0, "steps": 4}]])
def test_changes_on_record(tmp_path: Path, changes: Any) -> None:
    run_search(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "changes": changes}))
    refuses(tmp_path, run_search, "config.json", "changes")


@pytest.mark.parametrize("out", ["", "a\0b"])
def test_no_name_of_a_folder(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in (run_search, run_scale):
        with pytest.raises(InputError, match="out must name a folder"):
            run(out)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
