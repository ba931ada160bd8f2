"""A training that is killed with SIGKILL, wherever, and started again ends on the same bits."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_program import run, run_killed, run_killed_in_write, run_on_full_disk, write_images

from asvit_fast.errors import InputError
from asvit_fast.training import TrainResult
from asvit_fast.training.checkpoint import BEST, LAST

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["asvit_fast.training"])
TIMES = ("seconds", "train_seconds", "images_per_second")
ENDS: dict[str, dict[str, Any]] = {  # what makes resuming hard: generators, moving averages, loss scales, pass sizes
    "everything drawn": {},
    "float16": {"amp": True, "amp_dtype": "float16"},
    "several passes": {"batch_size": 2, "grad_accum_steps": 4, "phase_batch_sizes": "auto"},
    "clipped, no mixing": {"clip_grad": 1.0, "mixup": 0.0, "cutmix": 0.0, "opt": "lamb"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("images")))


def killed(function: Any, *arguments: Any) -> None:
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def assert_same_end(found: TrainResult, expected: TrainResult) -> None:
    for ours, theirs in ((found.model, expected.model), (found.ema, expected.ema)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in one.epochs] for one in (found, expected)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ENDS)
def test_killed_in_the_middle_of_an_epoch(tmp_path: Path, name: str) -> None:
    """Six updates an epoch, a checkpoint after each second: killed in the first, second and third phase."""
    out, expected = str(tmp_path / "run"), run(None, **ENDS[name])
    for update in (3, 9, 17) if name == "everything drawn" else (9,):
        killed(run_killed, out, update, None, ENDS[name])
        assert torch.load(tmp_path / "run" / LAST, weights_only=True)["asvit_fast"]["position"]["update"] > 0
    assert_same_end(run(out, **ENDS[name]), expected)


@pytest.mark.slow
def test_killed_while_reading_image_files(tmp_path: Path, folder: str) -> None:
    """Crops, RandAugment and erasing are drawn again as they were; the number of workers may change."""
    expected = run(None, folder, workers=0)
    killed(run_killed, str(tmp_path), 8, folder, {"workers": 2})
    assert_same_end(run(tmp_path, folder, workers=1), expected)


def test_goes_on_without_the_image_that_stopped_it(tmp_path: Path) -> None:
    """As if it had been told to skip such images from the start."""
    data = write_images(tmp_path / "data")
    (data / "train" / "class0" / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read"):
        expected = run(None, str(data), workers=0, bad_images="skip")
    with pytest.raises(InputError, match="bad_images=skip"):
        run(tmp_path / "run", str(data), workers=0)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert_same_end(run(tmp_path / "run", str(data), workers=0, bad_images="skip"), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_killed_while_writing(tmp_path: Path, count: int) -> None:
    killed(run_killed_in_write, str(tmp_path), count)
    assert_same_end(run(tmp_path), run(None))
    best = torch.load(tmp_path / BEST, weights_only=True)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert best["metric"] == max(max(row["top1"], row["ema_top1"]) for row in rows if row["token_reduction"] == 1)
    assert not list(tmp_path.glob(".*.tmp"))


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    out, message = tmp_path / "run", tmp_path / "message"
    killed(run_killed, str(out), 9)
    before = (out / LAST).read_bytes()
    process = CONTEXT.Process(target=run_on_full_disk, args=(str(out), len(before) // 2, str(message)))
    process.start()
    process.join(120)
    assert "cannot write" in message.read_text() and LAST in message.read_text()
    assert (out / LAST).read_bytes() == before
    assert_same_end(run(out), run(None))


def test_an_image_that_cannot_be_read_loses_nothing(tmp_path: Path, folder: str) -> None:
    """The training stops in the middle of an epoch with the file's name, and goes on once the file is repaired."""
    expected = run(None, folder, checkpoint_interval=0)
    victim = Path(folder) / "train" / "class2" / "5.png"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    try:
        with pytest.raises(InputError, match=r"class2.*5\.png"):
            run(tmp_path, folder, checkpoint_interval=0)
        position = torch.load(tmp_path / LAST, weights_only=True)["asvit_fast"]["position"]
        assert position["epoch"] == 0
    finally:
        victim.write_bytes(content)
    assert_same_end(run(tmp_path, folder, checkpoint_interval=0), expected)


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    from asvit_fast.run_directory import RunDirectory

    with (
        RunDirectory(tmp_path, {"kind": "train"}, LAST),
        pytest.raises(InputError, match="in use by another process"),
    ):
        run(tmp_path)
