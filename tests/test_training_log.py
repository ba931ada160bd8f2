"""Everything a training shows and writes while it runs."""

import csv
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asvit_fast.training import log as training_log
from asvit_fast.training.callbacks import EVENTS, TensorBoard, TrainingInfo
from asvit_fast.training.log import SUMMARY, Pace, TrainingLog

COST = {4: 1.0, 2: 4.0, 1: 16.0}
SCHEDULE = SimpleNamespace(reduction_at=lambda epoch: (4, 2, 1)[min(epoch, 2)])
ROWS = [{"epoch": 0, "train_loss": 2.5, "top1": 10.0}, {"epoch": 1, "train_loss": 1.5}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training_log, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def make(directory: Path | None = None, **options: object) -> TrainingLog:
    log = TrainingLog(directory, SCHEDULE, 4, 10, 32, COST, callbacks=[TensorBoard()], **options)
    log.begin(TrainingInfo({}, torch.nn.Identity(), directory, 4, 10, options.get("first_update", 0), log.print))
    return log


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(directory / EVENTS)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_remaining_time_knows_what_phases_cost(clock: SimpleNamespace) -> None:
    pace = Pace([4, 2, 1, 1], 10, COST)
    for _ in range(5):
        clock.now += 0.5
        pace.update(4, 0.1)
    assert pace.remaining(5) == pytest.approx(0.5 * (5 + 10 * 4 + 20 * 16))  # by cost: nothing else is known
    assert pace.data_share == pytest.approx(0.2)
    for _ in range(5):
        clock.now += 0.5
        pace.update(4, 0.0)
    clock.now += 7
    pace.pause()
    for _ in range(2):
        clock.now += 3.0
        pace.update(2, 0.0)
    assert pace.seconds == pytest.approx(3.0)  # neither the pause nor the other phase is in it
    assert pace.remaining(12) == pytest.approx(3.0 * 8 + 20 * 3.0 * 16 / 4 + 3 * 7)
    assert pace.remaining(40) == 0


def test_speed_is_that_of_the_last_updates(clock: SimpleNamespace) -> None:
    log = make(progress=False)
    for seconds in (10.0, *[0.5] * training_log.WINDOW):
        clock.now += seconds
        log.update(0, None, 0.1, 4)
    assert log.images_per_second == pytest.approx(64)


def test_validation_does_not_slow_updates_down(clock: SimpleNamespace) -> None:
    log = make(progress=False)
    clock.now += 0.5
    log.update(0, None, 0.1, 4)
    clock.now += 100
    log.epoch(ROWS[0])
    clock.now += 0.5
    log.update(1, None, 0.1, 4)
    assert log.images_per_second == pytest.approx(64)


def test_events_of_updates_and_epochs(tmp_path: Path, clock: SimpleNamespace) -> None:
    log = make(tmp_path, progress=False)
    for update in range(10):
        clock.now += 0.5
        loss = None if update % 2 else 3.0 - update
        log.update(update, loss, 0.1 * update, 4, grad_norm=loss and 2.0, data_seconds=0.25, terms={"patch": 0.3})
    log.epoch(ROWS[0])
    log.close()
    found = events(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [0, 2, 4, 6, 8]
    assert found["train/loss"][1][1] == pytest.approx(1.0)
    assert found["train/images_per_second"][-1][1] == pytest.approx(64)
    assert found["train/data_share"][-1][1] == pytest.approx(0.5)
    assert found["train/token_reduction"][0] == (0, 4.0)
    assert {"train/lr", "train/grad_norm", "train/loss_patch", "epoch/top1", "epoch/train_loss"} < set(found)
    assert found["epoch/top1"] == [(9, 10.0)]


def test_events_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    first = make(tmp_path, progress=False)
    for update in range(15):
        first.update(update, 1.0, 0.1, 4)
        if update == 9:
            first.epoch(ROWS[0])
    first.close()
    second = make(tmp_path, first_update=10, progress=False)
    for update in range(10, 13):
        second.update(update, 2.0, 0.1, 2)
    second.close()
    found = events(tmp_path)
    assert found["train/loss"] == [*((step, 1.0) for step in range(10)), *((step, 2.0) for step in range(10, 13))]
    assert found["epoch/top1"] == [(9, 10.0)]


def test_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = make(tmp_path)
    log.update(0, 1.0, 0.1, 4)
    log.epoch(ROWS[0])
    log.close()
    said = capsys.readouterr().err
    assert said.count("pip install 'asvit-fast[train]'") == 1
    assert not (tmp_path / EVENTS).exists()


def test_summary_is_made_from_all_rows(tmp_path: Path) -> None:
    log = make(tmp_path, progress=False)
    for count in (1, 2):
        log.write_summary(ROWS[:count])
    with open(tmp_path / SUMMARY, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "0", "train_loss": "2.5", "top1": "10.0"},
        {"epoch": "1", "train_loss": "1.5", "top1": ""},
    ]
    assert not list(tmp_path.glob(".*.tmp"))


def test_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = make(first_update=10, elapsed=3600)
    clock.now += 0.5
    log.update(10, 2.0, 0.1, 2)
    log.print("a line above")
    log.close()
    shown = terminal.getvalue()
    assert re.search(r"11/40 \[1:00:0\d, epoch 1/4, reduction 2, 64 images/s, loss 2, 00:44 left\]", shown)
    assert "a line above\n" in shown


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
    log = make()
    for update in range(10):
        clock.now += 11
        log.update(update, 2.0, 0.1, 4)
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # after 33, 66 and 99 seconds
    assert lines[0].startswith("update 3/40, epoch 0/4, reduction 4, 2.909 images/s, loss 2, ")
    assert "\r" not in "".join(lines)


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    log = TrainingLog(None, SCHEDULE, 4, 10, 32, COST, progress=False)
    log.update(0, 1.0, 0.1, 4)
    log.epoch(ROWS[0])
    log.write_summary(ROWS)
    log.print("nobody hears this")
    log.close()
    assert capfd.readouterr() == ("", "")


ROW = {
    "epoch": 1,
    "token_reduction": 2,
    "train_loss": 1.5,
    "top1": 50.0,
    "ema_top1": 51.25,
    "lr": 1e-3,
    "seconds": 61.0,
}


def test_a_line_for_each_epoch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a terminal and without, on a line of its own; resumed rows come from JSON."""
    expected = (
        "epoch 1/4, 2 times fewer tokens per side, loss 1.5, top-1 50.00 % (51.25 % of the averaged weights), "
        "lr 0.001, 01:01"
    )
    log = make()
    log.epoch(ROW)
    log.epoch(ROWS[1])
    log.close()
    assert capsys.readouterr().err.splitlines() == [expected, "epoch 1/4, loss 1.5"]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = make()
    log.epoch(ROW)
    log.close()
    assert expected + "\n" in terminal.getvalue().replace("\r", "\n")
