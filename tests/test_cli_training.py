"""``asvit-fast train`` and what comes after it: eval, another attempt with other options, mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_program import SIZE, TOPOLOGY, run, write_images

from asvit_fast.cli import main
from asvit_fast.cli.commands import TRAIN
from asvit_fast.training import Recipe
from asvit_fast.training.checkpoint import LAST


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("images")))


@pytest.fixture
def command(images: str, tmp_path: Path) -> list[str]:
    return (
        f"train {TOPOLOGY} --data {images} --out {tmp_path / 'run'} --img-size {SIZE} --epochs 3 "
        "--schedule 1:4,1:2,1:1 --batch-size 8 --workers 0 --checkpoint-interval 2 --lr 3e-3 --seed 3 --device cpu"
    ).split()


def test_every_choice_of_the_recipe_is_an_option() -> None:
    options = {option.name: option for option in TRAIN.options}
    for field in dataclasses.fields(Recipe):
        assert options[field.name].default == field.default
        assert options[field.name].help == field.metadata["help"]


def test_trains_says_what_it_saves_and_validates(
    command: list[str], images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    said = capsys.readouterr()
    assert "multiply-adds per image" in said.err and "saving" in said.err
    assert "2 times fewer tokens per side" in said.err and "full tokens" in said.err
    assert "asvit-fast eval" in said.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "trace.jsonl").read_text().splitlines()]
    assert main(["eval", str(tmp_path / "run" / LAST), "--data", images, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == pytest.approx(rows[-1]["top1"]) and found["loss"] == pytest.approx(rows[-1]["eval_loss"])


def test_it_is_the_function(command: list[str], images: str, tmp_path: Path) -> None:
    assert main([*command, "--quiet", "--mixup", "0.2", "--model-ema", "false"]) == 0
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert "state_dict_ema" not in state
    expected = run(None, images, mixup=0.2, model_ema=False)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(state["state_dict"][name], value), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schedule", "200:4,200:1"], ["400 epochs", "3"]),
        (["--schedule", "4:200"], ["4:200"]),
        (["--aa", "nonsense"], ["nonsense"]),
        (["--parallel", "both"], ["parallel", "both"]),
        (["--model-ema", "perhaps"], ["--model-ema", "perhaps"]),
        (["--scale", "0.5"], ["--scale", "0.5"]),
        (["--model-kwargs", "attn_scale"], ["NAME=VALUE"]),
        (["--initial-checkpoint", "nowhere.pth"], ["nowhere.pth"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--crop-pct", "2"], ["error: --crop-pct must be above 0"]),
        (["--mixup-prob", "3"], ["error: --mixup-prob must be from 0 to 1"]),
        (["--val-split", "tests"], ["did you mean --val-split 'val'?", "it holds 'train', 'val'"]),
        (["--train-split", "tests"], ["did you mean --train-split 'train'?"]),
        (["--lr", "-1"], ["--lr: expected a number that is finite and not negative, got '-1'"]),
        (["--lr", "0"], ["error: --lr must be above 0"]),
        (["--scale", "1,0.5"], ["error: --scale must be a smaller and a larger part"]),
        (["--ratio", "2,1"], ["error: --ratio must be a smaller and a larger number"]),
        (["--phase-batch-sizes", "3:8"], ["no phase of reduction 3, it has 4, 2, 1"]),
        (["--model-kwargs", f"topology={TOPOLOGY}"], ["the topology is given twice"]),
        (["--config", "nowhere.yaml"], ["--config: 'nowhere.yaml' cannot be read: No such file"]),
        (["--model-kwargs", "attnscale=true"], ["did you mean attn_scale?"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes(
    command: list[str], arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("asvit-fast: error: ")
    for word in words:
        assert word in error
    assert not (tmp_path / "run" / LAST).exists()


def test_the_folder_of_the_images_is_no_run_directory(
    command: list[str], images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(images).rglob("*"))
    for folder in (images, f"{images}/train", f"{images}/run"):
        command[command.index("--out") + 1] = folder
        assert main([*command, "--quiet"]) == 2
        assert "is in the folder of the images" in capsys.readouterr().err
    assert sorted(Path(images).rglob("*")) == before


@pytest.mark.parametrize("interpolation", ["lanczos", "box", "hamming", "random"])
def test_every_interpolation_goes_with_randaugment(command: list[str], interpolation: str, tmp_path: Path) -> None:
    aug = ["--aa", "rand-m9-mstd0.5-inc1", "--interpolation", interpolation, "--epochs", "1", "--schedule", "1"]
    assert main([*command, *aug, "--quiet"]) == 0


def test_a_start_that_did_nothing_is_forgotten(command: list[str], tmp_path: Path) -> None:
    nowhere = tmp_path / "run" / "config.json"
    nowhere.parent.mkdir()
    assert main([*command, "--quiet", "--epochs", "1", "--schedule", "1"]) == 0
    config = nowhere.read_text()
    for file in (tmp_path / "run").glob("*"):
        if file.is_file() and file.name != "config.json":
            file.unlink()
    nowhere.write_text(config.replace('"bicubic"', '"box"'))
    assert main([*command, "--quiet", "--epochs", "1", "--schedule", "1"]) == 0
    assert nowhere.read_text() == config


def test_more_outputs_than_classes(command: list[str], images: str, tmp_path: Path, capsys: Any) -> None:
    """eval agrees with the training also where some outputs have no images."""
    assert main([*command, "--quiet", "--num-classes", "20"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "trace.jsonl").read_text().splitlines()]
    assert main(["eval", str(tmp_path / "run" / LAST), "--data", images, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(rows[-1]["top1"])


def test_a_closed_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert main(["report", "nowhere"]) == 2


def test_a_class_without_images_stops_before_any_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "train" / "class7").mkdir()
    command[command.index("--data") + 1] = str(folder)
    assert main([*command, "--quiet"]) == 2
    assert "class7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_paths_in_messages_stay_as_they_are(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "a .b" / "img_size"
    command[command.index("--data") + 1] = str(nowhere)
    assert main([*command, "--quiet"]) == 2
    assert repr(str(nowhere)) in capsys.readouterr().err
