"""Callbacks of a training: what they are told, in which order, and what trackers make of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from training_program import TOPOLOGY, run

import asvit_fast as af
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.training import MlflowTracker, TrainingInfo, WandbTracker, callbacks


class Notes(af.Callback):
    """Everything that a callback is told."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.updates: list[int] = []
        self.rows: list[dict[str, Any]] = []
        self.fail_at = fail_at

    def on_train_begin(self, info: TrainingInfo) -> None:
        self.info = info
        self.calls.append("begin")

    def on_update(self, metrics: Mapping[str, float], update: int) -> None:
        if update == self.fail_at:
            raise RuntimeError("the tracker is down")
        assert set(metrics) >= {"loss", "lr", "images_per_second", "token_reduction", "data_share"}
        self.updates.append(update)

    def on_epoch(self, row: Mapping[str, Any], update: int) -> None:
        assert update == self.updates[-1]
        self.rows.append(dict(row))

    def on_train_end(self, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)
        self.calls.append("end")

    def close(self) -> None:
        self.calls.append("close")


def test_callbacks_follow_a_training(tmp_path: Path) -> None:
    notes = Notes()
    result = run(tmp_path / "run", callbacks=[notes])
    assert notes.calls == ["begin", "end", "close"]
    assert notes.updates == list(range(18)) and notes.rows == result.epochs
    assert notes.summary == json.loads((tmp_path / "run" / "result.json").read_text())
    info = notes.info
    assert (info.epochs, info.updates_per_epoch, info.first_update) == (3, 6, 0)
    assert info.model is result.model and info.config["schedule"] == "1:4,1:2,1:1"
    again = Notes()
    run(tmp_path / "run", callbacks=[again])  # nothing is left to follow
    assert again.calls == []


def test_a_callback_that_fails_costs_no_checkpoint(tmp_path: Path) -> None:
    failing, notes = Notes(fail_at=9), Notes()
    with pytest.raises(RuntimeError, match="the tracker is down"):
        run(tmp_path / "run", callbacks=[failing])
    assert failing.calls == ["begin", "close"]
    run(tmp_path / "run", callbacks=[notes])
    assert notes.info.first_update == 8 and notes.updates == list(range(8, 18))


def test_trackers_that_are_missing_are_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda name: None)
    for tracker in ("wandb", "mlflow"):
        command = f"train {TOPOLOGY} --data {tmp_path} --out {tmp_path / 'run'} --log-{tracker}".split()
        assert main(command) == 2
        assert f"needs {tracker}: pip install 'asvit-fast[trackers]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="log_wandb needs wandb"):
        WandbTracker()


def stopped_and_continued(out: Path, tracker: str) -> None:
    """A training that a callback ends in its second epoch, then the rest of it, followed by a tracker."""
    make = {"wandb": WandbTracker, "mlflow": MlflowTracker}[tracker]
    with pytest.raises(RuntimeError, match="down"):
        run(out, callbacks=[make(), Notes(fail_at=9)])
    run(out, callbacks=[make()])


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run for a training that was continued."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    stopped_and_continued(tmp_path / "out", "mlflow")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.run_name == "out" and found.info.status == "FINISHED"
    assert found.data.params["schedule"] == "1:4,1:2,1:1" and found.data.params["recipe.lr"] == "0.003"
    assert [one.step for one in client.get_metric_history(found.info.run_id, "epoch/train_loss")] == [5, 11, 17]
    steps = [one.step for one in client.get_metric_history(found.info.run_id, "train/loss")]
    assert sorted(set(steps)) == list(range(18))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: both parts are in runs of one name."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stopped_and_continued(tmp_path / "out", "wandb")
    identity = json.loads((tmp_path / "out" / "trackers.json").read_text())["wandb"]
    runs = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in runs} == {identity}
    assert any(path.suffix == ".wandb" and path.stat().st_size > 1000 for one in runs for path in one.iterdir())
