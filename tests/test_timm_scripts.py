"""`python -m asvit_fast.timm SCRIPT ARGS`: what a training script of timm's trains and validates in every epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.utils
import torch
from PIL import Image

from asvit_fast.training.timm_scripts import AVERAGES, main

TESTS = Path(__file__).parent
SCRIPT = str(TESTS / "timm_script.py")
TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
SCHEDULE = ["--retokenize", "1:4,1:2,1:1"]
GRIDS = {0: [4, 4], 1: [8, 8], 2: [16, 16]}  # of 64 pixels, by epoch of the schedule


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes of four images each."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for index in range(8):
            path = root / split / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(path)
    return str(root)


@pytest.fixture
def arguments(data: str) -> list[str]:
    return [SCRIPT, data, "--model-kwargs", f"topology='{TOPOLOGY}'", "img_size=64"]


def passes(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def grids(output: str, name: str = "model") -> dict[int, list[list[int]]]:
    """By epoch: the distinct grids of all its training and validation passes."""
    found: dict[int, list[list[int]]] = {}
    for one in passes(output):
        seen = found.setdefault(one["epoch"], [])
        if one[name] not in seen:
            seen.append(one[name])
    return found


def only(*epochs: int) -> dict[int, list[list[int]]]:
    return {epoch: [GRIDS[epoch]] for epoch in epochs}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sched-on-updates", "--amp"],
        ["--sched", "plateau"],
        ["--sched", "step", "--torchcompile", "eager"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("start", [0, 1, 2])
def test_every_epoch_has_its_tokens(arguments, options, start, capsys):
    assert main([*arguments, *options, "--start-epoch", str(start), *SCHEDULE]) == 0
    shown = capsys.readouterr()
    assert grids(shown.out) == only(*range(start, 3))
    assert {one["what"] for one in passes(shown.out)} == {"train", "validate"}
    switches = [line for line in shown.err.splitlines() if "(counted from 0)" in line]
    assert [line.split("from epoch ")[1][0] for line in switches] == [str(epoch) for epoch in range(max(start, 1), 3)]


@pytest.mark.parametrize("kind", [kind.__name__ for kind in AVERAGES])
def test_averages_follow(arguments, kind, capsys):
    assert main([*arguments, "--model-ema", kind, *SCHEDULE]) == 0
    assert grids(capsys.readouterr().out, "average") == only(0, 1, 2)


def test_a_teacher_keeps_its_tokens(arguments, capsys):
    assert main([*arguments, "--teacher", *SCHEDULE]) == 0
    shown = capsys.readouterr().out
    assert grids(shown) == only(0, 1, 2)
    assert grids(shown, "teacher") == {epoch: [GRIDS[2]] for epoch in range(3)}


@pytest.mark.parametrize("options", [[], ["--sched-on-updates"]], ids=" ".join)
def test_the_scheduler_stays_what_it_is(arguments, options, capsys):
    assert main([*arguments, *options, "--epochs", "1", "--retokenize=1"]) == 0
    assert f"CosineLRScheduler, by epochs: {not options}" in capsys.readouterr().out


def test_without_a_scheduler(arguments, capsys):
    """timm's ``--sched none``, where its version has it."""
    if "none" not in str(timm.scheduler.create_scheduler_v2.__doc__):
        pytest.skip("this timm has no --sched none")
    assert main([*arguments, "--sched", "none", *SCHEDULE]) == 0
    assert grids(capsys.readouterr().out) == only(0, 1, 2)


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_checkpoint_is_of_the_finest_tokens(arguments, decreasing, resumed, tmp_path, capsys):
    """However good a coarse phase was; also one that a resumed script remembers. Without an option, timm's rule."""
    metrics = "0.9,0.8,0.3,0.5,0.4" if not decreasing else "0.1,0.2,0.7,0.5,0.6"
    options = ["--metrics", metrics, "--output", str(tmp_path), *(["--decreasing"] if decreasing else [])]
    schedule = ["--retokenize", "1:4,1:2,3:1", "--epochs", "5"]
    if resumed:
        assert main([*arguments, *options, *schedule, "--stop-epoch", "2"]) == 0
        assert best(tmp_path)["epoch"] == 1  # of the two that there are
        options += ["--start-epoch", "2", "--resume", str(tmp_path / "last.pth.tar")]
    assert main([*arguments, *options, *schedule]) == 0
    assert best(tmp_path)["epoch"] == 3
    assert "best: epoch 3" in capsys.readouterr().out
    kept = {int(path.stem.split(".")[0].split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert kept >= {3, 4}  # of the two that are kept, and perhaps the last


def test_the_best_checkpoint_without_retokenization(arguments, tmp_path):
    assert main([*arguments, "--metrics", "0.9,0.8,0.3", "--output", str(tmp_path)]) == 0
    assert best(tmp_path)["epoch"] == 0


def best(folder: Path) -> dict:
    return torch.load(folder / "model_best.pth.tar", weights_only=True)


def test_what_the_schedule_saves_is_shown(arguments, capsys):
    assert main([*arguments, "--epochs", "4", *SCHEDULE]) == 0
    shown = capsys.readouterr().err
    lines = [line.split() for line in shown.splitlines() if " x " in line and "%" in line]
    assert [line[0] for line in lines] == ["0-0", "1-1", "2-3"]
    assert lines[2][-1] == "0.0%"


def test_a_script_of_a_user_without_retokenization(tmp_path, capsys):
    script = tmp_path / "script.py"
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    script.write_text(
        "import sys, timm, beside\nprint(sys.argv[1:], timm.is_model('asvit_seed'), beside.NAME, __name__)"
    )
    before = sys.argv, list(sys.path)
    assert main([str(script), "--help", "--epochs=3"]) == 0
    assert capsys.readouterr().out == "['--help', '--epochs=3'] True beside __main__\n"
    script.write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit, match="7"):
        main([str(script)])
    assert (sys.argv, sys.path) == before


def test_timm_is_left_as_it_was(arguments):
    functions = timm.create_model, timm.models.create_model, timm.utils.ModelEmaV3.__init__
    assert main([*arguments, "--epochs", "1", "--retokenize", "2"]) == 0
    assert functions == (timm.create_model, timm.models.create_model, timm.utils.ModelEmaV3.__init__)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no script given"),
        (["--retokenize", "1:4,1:1"], "no script given"),
        (["nowhere/train.py"], "nowhere/train.py"),
        ([SCRIPT, "--retokenize", "1:3"], "1:3"),
        ([SCRIPT, "--retokenize"], "''"),
        ([SCRIPT, "--retokenize", "1", "--retokenize=2"], "1 and 2"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    assert main(argv) == 2
    assert message in error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet18", "--model-kwargs"], "ResNet"),
        (["--torchscript"], "--torchscript"),
        (["--epochs", "2"], "the training has 2"),
        (["--omit", "model"], "timm.create_model"),
        (["--omit", "scheduler"], "create_scheduler_v2"),
        (["--omit", "epoch"], "no epoch"),
    ],
)
def test_what_cannot_be_retokenized_is_refused(arguments, options, message, capsys):
    assert main([*arguments, *options, *SCHEDULE]) == 2
    assert message in error(capsys)


def test_a_model_is_refused_before_data_is_read(arguments, capsys):
    arguments[1] = "no such folder"
    assert main([*arguments, "--model", "resnet18", "--model-kwargs", "drop_rate=0.0", *SCHEDULE]) == 2
    assert "ResNet" in error(capsys)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.slow
def test_two_processes(arguments, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "asvit_fast.timm"]
    done = run([*command, *arguments, "--model-ema", "ModelEmaV3", "--start-epoch", "1", *SCHEDULE], tmp_path)
    assert done.returncode == 0, done.stderr
    assert grids(done.stdout) == grids(done.stdout, "average") == only(1, 2)
    assert done.stderr.count("(counted from 0)") == 2 and done.stderr.count("multiply-adds per image") == 1  # of rank 0


@pytest.mark.skipif("ASVIT_FAST_TIMM" not in os.environ, reason="ASVIT_FAST_TIMM names no checkout of timm")
@pytest.mark.parametrize("model", ["asvit_seed", "vit_tiny_patch16_224"])
def test_train_py_of_timm(model, data, tmp_path):
    """Epochs 0 and 1, then the rest of the same training."""
    script = str(Path(os.environ["ASVIT_FAST_TIMM"]) / "train.py")
    command = ["-m", "asvit_fast.timm", script, data, "--model", model, "--num-classes", "2", "--img-size", "64"]
    command += ["--model-kwargs", "img_size=64", "--device", "cpu", "--batch-size", "4", "--workers", "1"]
    command += ["--model-ema", "--output", str(tmp_path), "--warmup-epochs", "0", "--epochs", "3", *SCHEDULE]
    first = run([*command, "--experiment", "first"], tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("(counted from 0)") == 2
    resumed = run(
        [*command, "--experiment", "second", "--resume", str(tmp_path / "first/checkpoint-0.pth.tar")], tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("(counted from 0)") == 2
    assert "Train: 1 " in resumed.stderr and "Train: 0 " not in resumed.stderr
