"""Evaluation: the figures of timm's validation, from every kind of checkpoint, on any number of processes."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm_validation import CHECKOUT, replayed, validate_py
from torch import nn

from asvit_fast.backends import FallbackWarning
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.export import export
from asvit_fast.training.build import build_from_checkpoint
from asvit_fast.training.evaluate import Evaluation, evaluate

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
CLASSES, SIZE = 7, 48


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of 7 classes in several sizes; the natural order of the names differs from that of strings."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(23):
        path = root / "val" / f"class{(number % CLASSES) * 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        width, height = (int(side) for side in generator.integers(40, 90, 2))
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return root


def network(seed: int = 0) -> nn.Module:
    """One whose answers depend on the image."""
    torch.manual_seed(seed)
    model = timm.create_model("asvit", topology=TOPOLOGY, img_size=SIZE, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def described(**arguments: Any) -> dict[str, Any]:
    """The "args" of a training of ours."""
    return {
        "model": "asvit",
        "num_classes": CLASSES,
        "img_size": SIZE,
        "model_kwargs": {"topology": TOPOLOGY},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        **arguments,
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.pth.tar"
    content = {"arch": "asvit", "epoch": 3, "args": described(), "state_dict": network().state_dict()}
    torch.save({**content, "state_dict_ema": network(1).state_dict()}, path)
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """The output of ``asvit-fast eval --json``."""
    code = main(["eval", *map(str, arguments), "--device", "cpu", "--json", "--workers", "0"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["eval", *map(str, arguments), "--device", "cpu", "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# --------------------------------------------------------------------------- the figures


class Fixed(nn.Module):
    """The logits are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout().eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return images.flatten(1)


def test_figures_of_known_logits() -> None:
    logits = torch.tensor([[9, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0.0], [5, 4, 3, 2, 1, 0]]).view(3, 6, 1, 1)
    targets = torch.tensor([0, 3, 5])  # right at once; among five; not even so
    model = Fixed().train()
    model.frozen.eval()
    found = evaluate(model, [(logits[:2], targets[:2]), (logits[2:], targets[2:])], CPU)
    assert (found.images, found.top1, found.top5) == (3, 100 / 3, 200 / 3)
    assert found.loss == pytest.approx(F.cross_entropy(logits.flatten(1), targets).item(), rel=1e-6)
    assert model.training and not model.frozen.training
    assert found.to_dict() == {"images": 3, "top1": found.top1, "top5": found.top5, "loss": found.loss}


def test_counts_are_exact() -> None:
    """timm's percentage of a batch is a float32: 5 of 13 right come back as 4.9999995."""
    logits = torch.eye(6).repeat(3, 1)[:13].view(13, 6, 1, 1)
    targets = torch.where(torch.arange(13) < 5, torch.arange(13) % 6, (torch.arange(13) + 1) % 6)
    assert evaluate(Fixed(), [(logits, targets)] * 3, CPU).top1 == 100 * 15 / 39


def test_fewer_than_five_classes_and_other_losses() -> None:
    logits, targets = torch.eye(3).view(3, 3, 1, 1), torch.tensor([0, 2, 1])
    seen = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(labels))
        return torch.tensor(float(len(labels)))

    found = evaluate(Fixed(), zip(logits.split(2), targets.split(2), strict=True), CPU, loss=loss)
    assert found == Evaluation(3, 100 / 3, 100.0, 5 / 3)  # (2 x 2 + 1 x 1) / 3
    assert seen == [2, 1]


def test_autocast_reaches_the_network() -> None:
    seen = []

    class Watched(Fixed):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((images @ images.mT).dtype)
            return super().forward(images)

    batch = (torch.randn(2, 3, 2, 2), torch.tensor([0, 1]))
    evaluate(Watched(), [batch], CPU, autocast=functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    evaluate(Watched(), [batch], CPU)
    assert seen == [torch.bfloat16, torch.float32]


def test_no_images() -> None:
    with pytest.raises(InputError, match="no images"):
        evaluate(Fixed(), [], CPU)


def test_two_processes_with_uneven_shares() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = str(TESTS / "evaluation_program.py")
    done = subprocess.run([*command, program], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "agree 0" in done.stdout and "agree 1" in done.stdout


# --------------------------------------------------------------------------- timm's validation


def same(found: dict[str, Any], expected: Evaluation) -> None:
    assert found["images"] == expected.images
    for name in ("top1", "top5", "loss"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-5), name


@pytest.mark.parametrize("prefetcher", [False, True])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--crop-pct", "1.0", "--interpolation", "bicubic"], {"crop_pct": 1.0, "interpolation": "bicubic"}),
        (["--img-size", "64", "--batch-size", "4"], {"img_size": 64}),
    ],
)
def test_same_figures_as_timm(
    checkpoint: Path, images: Path, capsys: Any, options: list[str], arguments: dict[str, Any], prefetcher: bool
) -> None:
    expected = replayed(network(), images, prefetcher, **{**described(), **arguments})
    assert 0 < expected.top1 < expected.top5 < 100
    found = evaluated(capsys, checkpoint, "--data", images, *options)
    same(found, expected)
    assert found["model"] == "asvit" and found["crop_pct"] == arguments.get("crop_pct", 0.8)


@pytest.mark.skipif(CHECKOUT is None, reason="ASVIT_FAST_TIMM names no checkout of timm")
def test_same_figures_as_validate_py(checkpoint: Path, images: Path, capsys: Any) -> None:
    options = f"--model asvit --num-classes {CLASSES} --img-size {SIZE} --crop-pct 0.8 --interpolation bilinear"
    options += " --mean 0.5 --std 0.25 --no-prefetcher --model-kwargs"
    theirs = validate_py(
        images, "--checkpoint", str(checkpoint), *options.split(), f"topology={TOPOLOGY}", f"img_size={SIZE}"
    )
    found = evaluated(capsys, checkpoint, "--data", images)
    assert (round(found["top1"], 4), round(found["top5"], 4), f"{found['loss']:.4f}") == theirs


# --------------------------------------------------------------------------- checkpoints


def test_checkpoints_of_every_kind(checkpoint: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    expected = evaluated(capsys, checkpoint, "--data", images)
    assert evaluated(capsys, tmp_path, "--data", images)["loss"] == expected["loss"]  # a run's folder: the last
    best = {"arch": "asvit", "args": described(), "state_dict": network(1).state_dict()}
    torch.save(best, tmp_path / "model_best.pth.tar")
    average = evaluated(capsys, checkpoint, "--data", images, "--use-ema")
    assert average["loss"] != expected["loss"] and average["use_ema"] is True
    assert evaluated(capsys, tmp_path, "--data", images)["loss"] == average["loss"]

    fixed = ("--img-size", SIZE, "--crop-pct", "0.8", "--interpolation", "bilinear")
    weights = tmp_path / "weights.pth"
    torch.save({f"module.{name}": value for name, value in network().state_dict().items()}, weights)
    kwargs = ("--model-kwargs", f"topology={TOPOLOGY}", "--model-kwargs", f"img_size={SIZE}")
    bare = evaluated(capsys, weights, "--data", images, "--model", "asvit", "--num-classes", CLASSES, *kwargs, *fixed)
    timm_args = argparse.Namespace(**described(model_kwargs={"topology": TOPOLOGY, "img_size": SIZE}), gp=None)
    timm_file = tmp_path / "timm.pth.tar"
    torch.save({"arch": "asvit", "args": timm_args, "state_dict": network().state_dict()}, timm_file)
    assert evaluated(capsys, timm_file, "--data", images)["loss"] == expected["loss"]
    # bare weights know nothing of mean and std: the network's defaults
    with_defaults = replayed(network(), images, True, img_size=SIZE, crop_pct=0.8, interpolation="bilinear")
    same(bare, with_defaults)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "asvit"])
def test_the_classifier_says_how_many_classes(tmp_path: Path, name: str) -> None:
    options = {"topology": TOPOLOGY, "img_size": SIZE} if name == "asvit" else {}
    model = timm.create_model(name, num_classes=CLASSES, **options)
    path = tmp_path / "other.pth"
    torch.save({"arch": name, "args": {"model_kwargs": options}, "state_dict": model.state_dict()}, path)
    built: Any = build_from_checkpoint(path)
    assert built.model.num_classes == CLASSES
    assert timm.create_model(f"local-dir:{export(path, tmp_path / 'export')}", pretrained=True).num_classes == CLASSES


def test_bare_weights_of_another_size(tmp_path: Path, images: Path, capsys: Any) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(network().state_dict(), weights)
    options = ("--model", "asvit", "--model-kwargs", f"topology={TOPOLOGY}", "--img-size", SIZE)
    assert evaluated(capsys, weights, "--data", images, *options)["img_size"] == [SIZE, SIZE]


def test_a_training_without_its_checkpoints(tmp_path: Path, images: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"kind": "train"}')
    assert "without its checkpoints" in refused(capsys, tmp_path, "--data", images)


def test_warnings_and_logs_are_plain(
    checkpoint: Path, images: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def build(*arguments: Any) -> Any:
        shown.append(warnings.formatwarning("first line\nsecond line", FallbackWarning, "file.py", 1))
        return build_from_checkpoint(*arguments)

    monkeypatch.setattr("asvit_fast.cli.eval.build_from_checkpoint", build)
    assert main(["eval", str(checkpoint), "--data", str(images), "--device", "cpu", "--workers", "0"]) == 0
    assert shown == ["asvit-fast: warning: first line second line\n"]
    assert capsys.readouterr().err == ""  # no bar: it is no terminal


def test_exported_folder(images: Path, tmp_path: Path, capsys: Any) -> None:
    folder = export(TOPOLOGY, tmp_path / "export", num_classes=CLASSES, img_size=SIZE)
    found = evaluated(capsys, folder, "--data", images, "--img-size", SIZE)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    same(found, replayed(model, images, True, img_size=SIZE))


def test_networks_that_are_made_for_one_size(images: Path, tmp_path: Path, capsys: Any) -> None:
    options = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=SIZE, **options)
    path = tmp_path / "vit.pth.tar"
    arguments = described(model="vit_tiny_patch16_224", model_kwargs=options)
    torch.save({"arch": "vit_tiny_patch16_224", "args": arguments, "state_dict": model.state_dict()}, path)
    same(evaluated(capsys, path, "--data", images), replayed(model, images, True, **arguments))
    assert evaluated(capsys, path, "--data", images, "--img-size", 64)["img_size"] == [64, 64]


def test_text_and_mixed_precision(checkpoint: Path, images: Path, capsys: Any) -> None:
    exact = evaluated(capsys, checkpoint, "--data", images)
    halved = evaluated(capsys, checkpoint, "--data", images, "--amp")
    assert halved["loss"] != exact["loss"] and halved["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert main(["eval", str(checkpoint), "--data", str(images), "--device", "cpu", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "23 images" in lines[0] and "48x48" in lines[0]
    assert lines[1].startswith(f"Acc@1 {exact['top1']:.3f} ({100 - exact['top1']:.3f}) Acc@5 {exact['top5']:.3f}")


def test_refused_checkpoints(checkpoint: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    there = ("--data", images)
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", *there)
    (tmp_path / "empty").mkdir()
    assert "holds neither a run nor an export" in refused(capsys, tmp_path / "empty", *there)
    text = tmp_path / "text.pth"
    text.write_text("weights")
    assert "not a checkpoint" in refused(capsys, text, *there)
    torch.save({"arch": "asvit", "state_dict": network().state_dict(), "args": Path("x")}, text)
    assert "loaded safely" in refused(capsys, text, *there)
    torch.save([1], text)
    assert "holds list" in refused(capsys, text, *there)
    torch.save({"epoch": 3}, text)
    assert "holds no weights (epoch)" in refused(capsys, text, "--model", "asvit", *there)
    torch.save(network().state_dict(), text)
    assert "its name as model" in refused(capsys, text, *there)
    assert "asvlt" in refused(capsys, text, "--model", "asvlt", *there)
    assert "leave out --use-ema" in refused(capsys, text, "--model", "asvit", "--use-ema", *there)
    assert "with these arguments" in refused(capsys, text, "--model", "asvit", "--model-kwargs", "wings=2", *there)
    assert "do not fit asvit" in refused(capsys, text, "--model", "asvit", "--num-classes", "5", *there)
    assert "no moving average" in refused(capsys, text, "--model", "asvit", "--use-ema", *there)
    assert "expected NAME=VALUE" in refused(capsys, text, "--model-kwargs", "depth", *there)


def test_refused_images(checkpoint: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    assert "does not exist" in refused(capsys, checkpoint, "--data", tmp_path / "nowhere")
    missing = refused(capsys, checkpoint, "--data", images, "--split", "test")
    assert "has no 'test'" in missing and "did you mean --split 'val'?" in missing
    split = images / "val"
    assert evaluated(capsys, checkpoint, "--data", split, "--split", "")["images"] == 23
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class{number * 5}\n" for number in range(CLASSES - 1)))
    fewer = evaluated(capsys, checkpoint, "--data", images, "--class-map", names)
    assert fewer["images"] == 20  # images of other classes are left out, as timm does
    other = tmp_path / "other" / "val" / "class0"
    other.mkdir(parents=True)
    (other / "0.png").write_bytes(next(split.rglob("*.png")).read_bytes())
    assert "the network has 7 classes, the images 1" in refused(capsys, checkpoint, "--data", tmp_path / "other")


def test_random_interpolation_is_none_for_validation(checkpoint: Path) -> None:
    built = build_from_checkpoint(checkpoint)
    assert built.data_config(interpolation="random")["interpolation"] == "bicubic"
    assert built.data_config((48, 64))["input_size"] == (3, 48, 64)
    assert built.data_config()["mean"] == (0.5, 0.5, 0.5)
