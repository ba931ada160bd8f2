"""The report of search and scaling runs: plots, page, and what is said about runs that cannot be drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from asvit_fast.errors import InputError
from asvit_fast.files import to_json
from asvit_fast.report import report
from asvit_fast.report.plots import Point
from asvit_fast.search import Policy
from asvit_fast.topology import SearchSpace, Topology

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(directory: Path, config: dict[str, Any], trace: list[dict], result: dict | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(to_json(config))
    (directory / "trace.jsonl").write_text("".join(to_json(record) + "\n" for record in trace))
    if result is not None:
        (directory / "result.json").write_text(to_json(result))
    return directory


def write_search(directory: Path, steps: int = 12, finished: bool = True) -> Path:
    """A run directory as a search leaves it, with scores from a formula; every fifth NTK condition is infinite."""
    space, generator = SearchSpace(), torch.Generator().manual_seed(0)
    trace = []
    for step in range(steps):
        topology = space.sample(generator)
        trace.append(
            {
                "step": step,
                "topology": str(topology),
                "action": [0] * 12,
                "length_distortion": 50 + 7 * math.sin(step),
                "ntk_condition": math.inf if step % 5 == 4 else 5 + step,
                "reward": math.cos(step),
                "baseline": 0.0,
                "log_prob": -15.3,
                "entropy": 15.33 - 0.1 * step,
                "most_probable": str(topology),
                "params": 2_300_000 + step,
                "flops": 490_000_000,
                "seconds": 0.5,
                "rejected": [{"topology": str(topology), "reason": "too large"}] if step == 3 else [],
            }
        )
    config = {"kind": "search", "steps": steps, "space": {k: list(v) for k, v in space.dimensions.items()}, "seed": 0}
    last = trace[-1]
    result = {name: last[name] for name in ("topology", "length_distortion", "ntk_condition", "params", "flops")}
    result |= {"kind": "search", "steps": steps, "entropy": 14.2}
    return write_run(directory, config, trace, result if finished else None)


def write_scale(directory: Path, steps: int = 4, finished: bool = True) -> Path:
    """A run directory as a scaling run leaves it."""
    start = topology = Topology.parse("8,2,3|4,1,2|4,1,4|4,1,6|32")
    trace = []
    for step in range(steps):
        grown = [
            topology.replace(
                depths=[depth + (index == stage) for index, depth in enumerate(topology.depths)],
                width=topology.width + extra,
            )
            for stage in range(4)
            for extra in (2, 4)
        ]
        candidates = [
            {
                "topology": str(candidate),
                "scored_width": candidate.width,
                "params": 2e6 + 1e5 * index,
                "flops": 5e8,
                "length_distortion": 10.0 + index,
                "ntk_condition": math.nan if index == 0 else 6.0 + (index % 3),
                "rank_sum": index,
            }
            for index, candidate in enumerate(grown)
        ]
        topology = grown[step % 8]
        chosen = {"topology": str(topology), "params": 2e6 + step * 1e6, "flops": 5e8, "seconds": 1.0}
        trace.append({"step": step, "candidates": candidates, "dropped": [], **chosen})
    result = {
        "kind": "scale",
        "start": str(start),
        "topology": str(topology),
        "params": 5e6,
        "flops": 5e8,
        "steps": steps,
    }
    return write_run(directory, {"kind": "scale", "topology": str(start)}, trace, result if finished else None)


def write_baseline(directory: Path, topologies: int = 12) -> None:
    """The random baseline of a search, as ``search --baseline random`` leaves it; one has no finite condition."""
    records = [
        {"step": step, "topology": "", "length_distortion": 45.0 + step, "ntk_condition": 30.0 if step else math.inf}
        for step in range(topologies)
    ]
    write_run(directory / "baseline", {"kind": "baseline"}, records, None)


def images_in(page: Path) -> list[str]:
    return re.findall(r'<img [^>]*src="([^"]+)"', page.read_text())


def test_random_baseline_and_starts_are_shown(tmp_path: Path) -> None:
    page = report(write_search(tmp_path))
    alone = page.with_name("search_progress.png").read_bytes()
    write_baseline(tmp_path)
    start = {"date": "2026-11-25 10:00", "command": "asvit-fast search --out x", "machine": "EPYC", "versions": "2.14"}
    (tmp_path / "starts.jsonl").write_text(to_json(start) + "\n")
    text = report(tmp_path).read_text()
    assert page.with_name("search_progress.png").read_bytes() != alone
    assert "asvit-fast search --out x" in text
    assert "EPYC" in text


def test_options_are_in_words(tmp_path: Path) -> None:
    directory = write_search(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"images": None, "device": "", "budget": {"params": [None, 4e6], "flops": None}, "amp": True}
    (directory / "config.json").write_text(to_json(config))
    rows = re.findall(r"<td[^>]*>([^<]*)</td>", report(directory).read_text())
    assert "params: none, 4000000.0; flops: none" in rows
    assert "yes" in rows
    assert not {"None", "True", "False", "{}", "[]"} & set(rows)


@pytest.mark.parametrize("finished", [True, False])
def test_search_report(tmp_path: Path, finished: bool) -> None:
    page = report(write_search(tmp_path, finished=finished))
    assert page == tmp_path / "report.html"
    names = ["search_candidates.png", "search_pareto.png", "search_progress.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 20_000 for path in tmp_path.glob("*.png"))
    html = page.read_text()
    assert ("finished after 12 steps" if finished else "not finished: 12 steps so far") in html
    assert "Best sampled topologies" in html
    assert "<td>K1</td>" in html


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = report(write_search(tmp_path))
    assert len(images_in(page)) == 3
    assert all(source.startswith("data:image/png;base64,") for source in images_in(page))
    assert not re.search(r'(src|href)="(?!data:)', page.read_text())
    assert "http" not in page.read_text()


@pytest.mark.parametrize("finished", [True, False])
def test_scale_report(tmp_path: Path, finished: bool) -> None:
    page = report(write_scale(tmp_path, finished=finished))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["scale_candidates.png", "scale_trajectory.png"]
    assert "Growth" in page.read_text()


def test_both_runs_in_subfolders(tmp_path: Path) -> None:
    write_search(tmp_path / "search")
    write_scale(tmp_path / "scale")
    page = report(tmp_path)
    assert page.parent == tmp_path
    assert len(images_in(page)) == 5
    assert len(list(tmp_path.glob("*.png"))) == 5


@pytest.mark.parametrize("steps", [1, 2])
def test_first_steps_can_be_drawn(tmp_path: Path, steps: int) -> None:
    report(write_search(tmp_path / "search", steps, finished=False))
    report(write_scale(tmp_path / "scale", steps, finished=False))


def test_policy_of_the_state_is_shown(tmp_path: Path) -> None:
    write_search(tmp_path)
    policy = Policy(SearchSpace())
    with torch.no_grad():
        policy.logits[4] += 100  # K1 = 8 for certain
    torch.save({"trace_lines": 12, "policy": policy.state_dict()}, tmp_path / "state.pt")
    row = re.search(r"<tr><td>K1</td>.*?</tr>", report(tmp_path).read_text())
    assert row is not None
    assert "<b>8</b> &nbsp;100 %" in row.group()
    assert "<b>4</b> &nbsp;0 %" in row.group()


def test_torn_last_line_is_ignored(tmp_path: Path) -> None:
    write_search(tmp_path)
    with (tmp_path / "trace.jsonl").open("a") as file:
        file.write('{"step": 12, "topo')
    assert "12 steps" in report(tmp_path).read_text()


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    write_search(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"images": "<script>alert(1)</script>"}))
    assert "<script>" not in report(tmp_path).read_text()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no run"):
        report(tmp_path)


def test_nothing_to_draw_yet(tmp_path: Path) -> None:
    write_search(tmp_path)
    (tmp_path / "trace.jsonl").write_text("")
    with pytest.raises(InputError, match="no finished step"):
        report(tmp_path)
    (tmp_path / "trace.jsonl").unlink()
    with pytest.raises(InputError, match="no finished step"):
        report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json"),
        ("config.json", "[]", "JSON object"),
        ("config.json", '{"kind": "bake"}', "'bake'"),
        ("trace.jsonl", '{"step": 0}\n', "not a trace of search"),
        ("trace.jsonl", "oops\n{}\n", "trace.jsonl"),
        ("state.pt", "oops", "state.pt"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_search(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_unreadable_result_does_not_replace_an_earlier_report(tmp_path: Path) -> None:
    before = report(write_search(tmp_path)).read_bytes()
    (tmp_path / "trace.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(InputError):
        report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0, 0.0])
def test_only_finite_positive_conditions_have_a_place_on_the_axis(value: float) -> None:
    assert not Point(1.0, value, 0).finite
    assert Point(1.0, 2.0, 0).finite
