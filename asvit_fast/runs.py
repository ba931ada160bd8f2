"""Reading run directories, which run_directory.py writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_jsonl
from .run_directory import BASELINE, CONFIG, RESULT, STARTS, TRACE, read_json

DESIGNS = ("search", "scale")  # runs whose result is a topology
TRAININGS = ("train", "detect")
KINDS = (*DESIGNS, *TRAININGS, "study")


@dataclass(frozen=True)
class Run:
    """One run directory: its options, its steps so far, and its result once it is finished; of a search, the steps of
    its random baseline; the times that it was started."""

    kind: str
    directory: Path
    config: dict[str, Any]
    trace: list[dict[str, Any]]
    result: dict[str, Any] | None
    baseline: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def topology(self) -> str:
        """The final topology, or the one that leads so far; of a training, the network's name; of a study, nothing."""
        if self.kind in TRAININGS:
            return _text(self.config.get("model"), "model", self.directory / CONFIG)
        if self.kind == "study":
            return ""
        if self.result is not None:
            return _text(self.result, "topology", self.directory / RESULT)
        leads = {"search": "best" if "rule" in self.config else "most_probable", "scale": "topology"}[self.kind]
        return _text(self.trace[-1], leads, self.directory / TRACE)


def find_runs(directory: Path, kinds: Sequence[str] = DESIGNS) -> list[Run]:
    """The run in ``directory`` itself, or those in its subfolders named as ``kinds``. InputError when there is none."""
    commands = f"give the --out of asvit-fast {' or '.join(kinds)}"
    if directory.is_file():
        raise InputError(f"{str(directory)!r} is a file, not a run directory; {commands}")
    if not directory.is_dir():
        raise InputError(f"run directory {str(directory)!r} does not exist; {commands}")
    folders = [folder for folder in (directory, *(directory / kind for kind in kinds)) if has_run(folder)]
    if not folders:
        raise InputError(f"{str(directory)!r} holds no run (no {CONFIG}); {commands}")
    return [read_run(folder, kinds) for folder in folders]


def find_compared(directory: Path) -> tuple[list[Run], list[str]]:
    """The finished searches and growths in subfolders of any name, in their order, and what is left out: names of
    subfolders with other runs, unfinished, damaged or repeated ones, with the reason. Nothing where ``directory`` is a
    run itself or has its runs in subfolders named as their kinds. InputError where there are runs, and none to compare.
    """
    if not directory.is_dir() or any(has_run(folder) for folder in (directory, *(directory / kind for kind in KINDS))):
        return [], []
    runs: list[Run] = []
    left_out = []
    for folder in sorted(filter(has_run, directory.iterdir())):
        run = _comparable(folder, runs)
        if isinstance(run, Run):
            runs.append(run)
        else:
            left_out.append(f"{folder.name} ({run})")
    if left_out and not runs:
        raise InputError(
            f"{str(directory)!r} holds no finished {' or '.join(DESIGNS)} runs to compare, but {', '.join(left_out)}; "
            "give one of them"
        )
    return runs, left_out


def _comparable(folder: Path, others: Sequence[Run]) -> Run | str:
    """The run in a folder, or why it is not to be compared with others."""
    try:
        if (kind := _read_object(folder / CONFIG).get("kind")) not in DESIGNS:
            return str(kind)
        if not (folder / RESULT).is_file():
            return "not finished"
        run = read_run(folder, DESIGNS)
    except InputError:
        return "damaged"
    same = [other.directory.name for other in others if _decisive(other) == _decisive(run)]
    return f"as {same[0]}" if same else run


def _decisive(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.config.items() if name not in ("version", "changes")}


def rule_of(run: Run) -> str:
    """What chose in a search or a growth."""
    return str(run.config.get("rule", {"search": "reinforce", "scale": "scores"}[run.kind]))


def has_run(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_run(directory: Path, kinds: Sequence[str]) -> Run:
    """Raises InputError when the configuration is not one of a run, or no step is on record."""
    config = _read_object(directory / CONFIG)
    kind = str(config.get("kind"))
    if kind not in kinds:
        expected = " or ".join(kinds)
        raise InputError(f"{str(directory / CONFIG)!r} is of kind {kind!r}; give a {expected} run")
    result = _read_object(directory / RESULT) if (directory / RESULT).is_file() else None
    trace = read_jsonl(directory / TRACE)
    if not trace:
        raise InputError(f"{str(directory / TRACE)!r} has no finished step yet; let asvit-fast {kind} run for a while")
    baseline, starts = read_jsonl(directory / BASELINE / TRACE), read_jsonl(directory / STARTS)
    return Run(kind, directory, config, trace, result, baseline, starts)


def _text(record: Any, name: str, path: Path) -> str:
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{str(path)!r}: {name} must be text, got {found!r}; restore it or start a new run directory")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content
