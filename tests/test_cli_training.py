"""``asvit-fast train`` and what comes after it: eval, another attempt with other options, mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from training_program import SIZE, TOPOLOGY, run, write_images

from asvit_fast.cli import main
from asvit_fast.cli.train import COMMAND
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
    options = {option.name: option for option in COMMAND.options}
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
        (["--val-split", "tests"], ["did you mean --val-split 'val'?", "--val-split '' trains without"]),
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
    before = sorted(Path(images).iterdir())
    command[command.index("--out") + 1] = images
    assert main([*command, "--quiet"]) == 2
    assert "is the folder of the images" in capsys.readouterr().err
    assert sorted(Path(images).iterdir()) == before


def test_a_class_without_images_stops_before_any_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "train" / "class7").mkdir()
    command[command.index("--data") + 1] = str(folder)
    assert main([*command, "--quiet"]) == 2
    assert "class7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
