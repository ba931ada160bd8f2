"""``asvit-fast detect train|eval|show`` and the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from detection_program import DETECTOR, TOPOLOGY, write_coco
from PIL import Image

from asvit_fast.cli import main
from asvit_fast.cli.commands import DETECT_TRAIN
from asvit_fast.recipe import DetectionRecipe

pytest.importorskip("pycocotools")


def command(folder: Path, out: Path) -> list[str]:
    text = (
        f"--data {folder} --out {out} --detector cascade_mask_rcnn --epochs 2 --schedule 1:2,1:1 --out-channels 8 "
        "--batch-size 4 --grad-accum-steps 1 --augmentation multiscale --scales 32,64 --min-size 48 --max-size 64 "
        "--workers 0 --device cpu"
    )
    kwargs = [part for name, value in DETECTOR.items() for part in ("--detector-kwargs", f"{name}={_yaml(value)}")]
    return [TOPOLOGY, *text.split(), *kwargs]


def _yaml(value: object) -> str:
    return json.dumps(list(value)) if isinstance(value, tuple) else str(value)


def test_every_choice_of_the_recipe_is_an_option() -> None:
    options = {option.name: option for option in DETECT_TRAIN.options}
    for field in dataclasses.fields(DetectionRecipe):
        assert options[field.name].default == field.default


def test_train_eval_show_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_coco(tmp_path / "coco"), tmp_path / "run"
    assert main(["detect", *command(folder, out)]) == 0  # detect WHAT
    said = capsys.readouterr()
    assert "2 times fewer tokens per side" in said.err and "AP " in said.err and "asvit-fast detect eval" in said.out
    rows = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert main(["detect", "train", *command(folder, out)]) == 0  # the same, and nothing is left to do
    assert [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()] == rows
    capsys.readouterr()

    results = tmp_path / "results.json"
    last = str(out / "last.pth.tar")
    common = ["--data", str(folder), "--workers", "0", "--device", "cpu"]
    assert main(["detect", "eval", last, *common, "--json", "--results", str(results)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 5 and found["ap"] == pytest.approx(rows[-1]["ap"])
    assert found["mask_ap"] == pytest.approx(rows[-1]["mask_ap"]) and json.loads(results.read_text())
    assert main(["detect", "eval", str(out), *common, "--windows", "split", "--min-size", "64"]) == 0
    assert "boxes: AP " in capsys.readouterr().out

    image = str(folder / "val" / "2.png")
    assert main(["detect", "show", str(out), image, image, "--out", str(tmp_path / "shown"), "--score", "0.01"]) == 0
    for name in ("2.png", "2_2.png"):
        with Image.open(tmp_path / "shown" / name) as picture:
            assert min(picture.size) >= 480 and picture.mode == "RGB"

    pytest.importorskip("matplotlib")
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "Training of a detector" in page and "AP of boxes (%)" in page and "The hardest images" in page
    for name in ("detect_epochs.png", "detect_cost.png", "detect_examples.png", "detect_hardest.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    (folder / "val" / "2.png").unlink()
    assert main(["report", str(out)]) == 0  # the images are gone: without their pictures
    assert "The hardest images" not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect", "eval", "nowhere.pth.tar", "--data", "."], "does not exist"),
        (["detect", "show", "x.pth.tar", "gone.png"], "'gone.png' does not exist"),
        (["detect", "show", "x.pth.tar", "."], "'.' is a folder; give image files"),
        (["detect", "eval", "x.pth.tar", "--data", ".", "--results", "gone/r.json"], "'gone/r.json' cannot be written"),
        (["detect", "eval", "x.pth.tar", "--data", ".", "--results", "."], "'.' cannot be written"),
        (["detect", "asvit_seed", "--data", ".", "--out", "x", "--scale-jitter", "2,1"], "the smaller first"),
        (["detect", "asvit_seed", "--data", ".", "--out", "x", "--scales", "64,32"], "the smaller first"),
        (["detect", "asvit_seed", "--out", "x"], "--data"),
        (["detect", "asvit_seed", "--data", ".", "--out", "x", "--detecter", "y"], "did you mean --detector"),
        (["detect", "evl", "runs/detect"], "detect does not know evl (did you mean eval?)"),
        (["detect", "asvit_seed", "--data", ".", "--out", "x", "--detector", "yolo"], "expected one of"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
