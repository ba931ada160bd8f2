"""The report of a training run."""

import itertools
import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_report import PNG, write_run, write_scale, write_search

from asvit_fast.errors import InputError
from asvit_fast.report import report, training_plots
from asvit_fast.report.plots import png
from asvit_fast.report.training_tables import phase_table, phases, training_result_table
from asvit_fast.runs import KINDS, find_runs

TOPOLOGY = "8,2,3|4,1,2|4,1,4|4,1,6|32"
FLOPS = {"1": 16_000_000, "2": 4_000_000, "4": 1_000_000}


def write_training(directory: Path, epochs: int = 8, finished: bool = True, validated: bool = True) -> Path:
    """A run directory as 4:4,2:2,2:1 leaves it; every second epoch is validated, and epoch 5 is the best."""
    trace = []
    for epoch in range(epochs):
        reduction = 4 if epoch < 4 else 2 if epoch < 6 else 1
        row = {"epoch": epoch, "token_reduction": reduction, "train_loss": 3.0 - 0.2 * epoch, "lr": 1e-3}
        row |= {"train_seconds": 64.0 / reduction**2, "images_per_second": 10.0 * reduction**2, "seconds": 70.0}
        if validated and epoch % 2:
            row |= {"top1": 10.0 + epoch, "top5": 50.0, "eval_loss": 2.5, "ema_top1": 40.0 if epoch == 5 else 5.0}
        trace.append(row)
    model = {
        "model": "asvit",
        "num_classes": 10,
        "img_size": 64,
        "model_kwargs": {"topology": "8,2,3|4,1,2|4,1,4|4,1,6|32"},
    }
    config = {"kind": "train", "model": model, "train_images": 1000, "schedule": "4:4,2:2,2:1", "epochs": 8}
    config |= {"images_per_update": 100, "flops": FLOPS, "saving": 0.6, "recipe": {"opt": "adamw", "lr": None}}
    return write_run(directory, config, trace, {"epochs": epochs, "top1": 17.0} if finished else None)


def table(made: tuple) -> dict[str, str]:
    return {row[0]: row[1] for row in made[3]}


def test_phases_and_what_they_cost(tmp_path: Path) -> None:
    (run,) = find_runs(write_training(tmp_path), KINDS)
    assert [(phase.reduction, len(phase.rows)) for phase in phases(run)] == [(4, 4), (2, 2), (1, 2)]
    _, _, header, rows = phase_table(run)
    assert rows[0] == ("1 to 4", "tokens / 16", "0.001", "6.2 %", "4 giga-MACs", "16.0", "4.0", "13.00")
    assert rows[-1] == ("7 to 8", "full tokens", "0.016", "100.0 %", "32 giga-MACs", "128.0", "64.0", "17.00")
    assert len(header) == len(rows[0])


def test_best_epoch_and_saving(tmp_path: Path) -> None:
    (run,) = find_runs(write_training(tmp_path), KINDS)
    found = table(training_result_table(run))
    assert found["best top-1 (%)"] == "17.00 after 8 epochs"  # 40 after 6 of them was on a coarse grid
    assert found["top-1 of the last validation (%)"] == "17.00"
    assert found["epochs"] == "8 of 8"
    # 4 epochs at 1/16, 2 at 1/4, 2 at 1 of 8 full ones
    assert found["saved of these by fewer tokens"] == f"{100 * (1 - (4 / 16 + 2 / 4 + 2) / 8):.1f} %"


@pytest.mark.parametrize("options", [{}, {"epochs": 1, "finished": False}, {"validated": False}])
def test_page_and_plots(tmp_path: Path, options: dict) -> None:
    page = report(write_training(tmp_path, **options)).read_text()
    for name in ("train_epochs.png", "train_cost.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert len(re.findall(r"data:image/png;base64,", page)) == 2
    assert "<h2>Training</h2>" in page and "Network <code>asvit</code>" in page and "<h3>Phases</h3>" in page
    assert ("finished after 8 epochs" in page) is options.get("finished", True)
    assert TOPOLOGY in page


def test_names_of_phases_keep_to_their_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float, float]] = []

    def draw(figure: Figure) -> bytes:
        figure.draw_without_rendering()
        for axes in figure.axes:
            places = [axes.get_window_extent()] + [text.get_window_extent() for text in axes.texts]
            drawn.extend((text.get_text(), box.x0, box.x1) for text, box in zip(axes.texts, places[1:], strict=True))
            ends = sorted((box.x0, box.x1) for box in places[1:])
            assert all(first[1] < second[0] for first, second in itertools.pairwise(ends)), drawn
        return png(figure)

    monkeypatch.setattr(training_plots, "png", draw)
    report(write_training(tmp_path, epochs=8))
    assert {"tokens / 16", "full tokens"} <= {text for text, _, _ in drawn}


def test_subfolders_of_all_kinds(tmp_path: Path) -> None:
    write_search(tmp_path / "search")
    write_scale(tmp_path / "scale")
    write_training(tmp_path / "train")
    page = report(tmp_path).read_text()
    places = [page.index(f"<h2>{title}</h2>") for title in ("Topology search", "Scaling", "Training")]
    assert places == sorted(places)
    assert [run.kind for run in find_runs(tmp_path)] == ["search", "scale"]  # what has a topology


def test_a_foreign_trace(tmp_path: Path) -> None:
    write_training(tmp_path)
    (tmp_path / "trace.jsonl").write_text(json.dumps({"epoch": 0, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="is not a trace of train"):
        report(tmp_path)


def test_not_a_number(tmp_path: Path) -> None:
    write_training(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    rows[3]["eval_loss"] = "nan"
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report(tmp_path).is_file()
