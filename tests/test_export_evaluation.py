"""A training's validation, eval of its run, eval of its export and timm's validation of the export: one figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import resolve_model_data_config
from timm_validation import CHECKOUT, replayed, validate_py

import asvit_fast as af
from asvit_fast.cli import main
from asvit_fast.export import export
from asvit_fast.recipe import Recipe
from asvit_fast.training import train
from asvit_fast.training.data import Reader, load_validation

TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
NAMES = [f"class{number * 5}" for number in range(6)]
OPTIONS: dict[str, Any] = {
    "epochs": 1, "batch_size": 6, "workers": 0, "device": "cpu", "progress": False, "lr": 1e-2, "warmup_epochs": 0,
    "model_ema_decay": 0.5, "checkpoint_interval": 0, "drop_path": 0.0,
}  # fmt: skip
FIGURES = ("images", "top1", "top5", "loss", "img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "squashed": (TOPOLOGY, {
        "img_size": 96, "crop_pct": 0.7, "crop_mode": "squash", "interpolation": "bilinear", "mean": 0.5, "std": 0.25,
    }),
    "bordered": (TOPOLOGY, {
        "img_size": (64, 96), "crop_pct": 1.0, "crop_mode": "border", "interpolation": "random",
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "schedule": "1:1",
    }),
    "grey": (TOPOLOGY, {"img_size": 64, "model_kwargs": {"in_chans": 1}, "mean": (0.45,)}),
    "windows": ("swin_tiny_patch4_window7_224", {"img_size": 96, "model_kwargs": SWIN}),
    "convolutions": ("test_resnet", {"img_size": 64, "crop_pct": 0.8}),
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images to train and 12 to validate, of 6 classes, in several sizes."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        split, label = ("train", "val")[number % 2], number // 2 % len(NAMES)
        path = root / split / NAMES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in generator.integers(40, 120, 2))
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return root


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """The output of ``asvit-fast eval --json``."""
    options = ["--device", "cpu", "--json", "--workers", "0", "--batch-size", "5"]
    assert main(["eval", *map(str, arguments), *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", list(RECIPES))
def test_one_figure(name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what, options = RECIPES[name]
    result = train(what, images, out=tmp_path / "run", **{**OPTIONS, **options})
    for average in (False, True):
        flags = ["--use-ema"] if average else []
        folder = export(tmp_path / "run", tmp_path / f"model{average}", use_ema=average)
        of_run = evaluated(capsys, tmp_path / "run", "--data", images, *flags)
        of_export = evaluated(capsys, folder, "--data", images)
        figures = (
            "images",
            "top1",
            "top5",
            "loss",
            "img_size",
            "crop_pct",
            "crop_mode",
            "interpolation",
            "mean",
            "std",
        )
        assert {key: of_run[key] for key in figures} == {key: of_export[key] for key in figures}
        row = result.epochs[-1]
        validated = (row["ema_top1"], row["ema_loss"]) if average else (row["top1"], row["eval_loss"])
        assert of_run["top1"] == validated[0] and of_run["loss"] == pytest.approx(validated[1], rel=1e-6)

        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        theirs = replayed(model, images)
        assert of_export["loss"] == pytest.approx(theirs.loss, rel=1e-6)
        assert (of_export["top1"], of_export["top5"]) == pytest.approx((theirs.top1, theirs.top5), abs=1e-4)
        check_configuration(json.loads((folder / "config.json").read_text()), model, options, of_export)
        if CHECKOUT is not None:
            channels = ["--in-chans", "1"] if name == "grey" else []
            printed = validate_py(images, "--model", f"local-dir:{folder}", "--pretrained", *channels)
            rounded = round(of_export["top1"], 4), round(of_export["top5"], 4), f"{of_export['loss']:.4f}"
            assert printed == rounded


def check_configuration(config: dict[str, Any], model: Any, options: dict[str, Any], found: dict[str, Any]) -> None:
    """timm's fields, and what timm makes of them."""
    height, width = np.broadcast_to(options["img_size"], 2)
    data, inner = resolve_model_data_config(model), config["pretrained_cfg"]
    channels = options.get("model_kwargs", {}).get("in_chans", 3)
    assert data["input_size"] == tuple(inner["input_size"]) == (channels, height, width)
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        assert inner[key] == found[key] and (list(data[key]) if key in ("mean", "std") else data[key]) == found[key]
    if "mean" in options:
        given = options["mean"] if isinstance(options["mean"], tuple) else (options["mean"],)
        assert inner["mean"] == list(given) * (channels // len(given))
    assert inner["crop_pct"] == options.get("crop_pct", 0.9)
    assert inner["num_classes"] == config["num_classes"] == len(NAMES)
    assert list(model.pretrained_cfg["label_names"]) == config["label_names"] == NAMES
    assert inner["fixed_input_size"] == config["architecture"].startswith("swin")
    assert inner["first_conv"] and inner["classifier"]
    assert not {"url", "file", "hf_hub_id", "source", "tag"} & set(inner)


def test_validation_images_are_those_of_timm(images: Path) -> None:
    """Bit for bit, as its loader prepares them for an export."""
    recipe = Recipe.of(crop_mode="border", crop_pct=0.8, interpolation="lanczos", workers=0)
    cpu, statistics = torch.device("cpu"), {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    reader = Reader(recipe, (40, 72), cpu, **statistics)
    ours = torch.cat([batch for batch, _ in load_validation(images, reader).batches(5)])
    found: list[torch.Tensor] = []

    class Watch(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            found.append(pixels.clone())
            return pixels.flatten(1)[:, :6]

    replayed(Watch(), images, input_size=(3, 40, 72), crop_mode="border", crop_pct=0.8, interpolation="lanczos",
             **statistics)  # fmt: skip
    assert torch.equal(ours, torch.cat(found))


def test_networks_that_were_made_in_python(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With arguments of their own, accelerated, or for another size of images than they are trained with."""
    torch.manual_seed(0)
    ours = af.create_model(TOPOLOGY, img_size=96, num_classes=6, pos_embed="absolute", attn_scale=True)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=6, window_size=4, **SWIN)
    assert af.accelerate(swin).swapped
    for number, model in enumerate((ours, swin)):
        run = tmp_path / f"run{number}"
        train(model, images, out=run, img_size=64, **{**OPTIONS, "model_ema": False})
        folder = export(run, tmp_path / f"model{number}")
        of_run, of_export = (evaluated(capsys, path, "--data", images) for path in (run, folder))
        assert of_run["loss"] == of_export["loss"] and of_export["img_size"] == [64, 64]
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        pixels = torch.randn(2, 3, 64, 64)  # [2, 3, H, W]
        torch.testing.assert_close(loaded(pixels), model.eval()(pixels), rtol=1e-4, atol=1e-5)
        again = timm.create_model(f"local-dir:{export(model, tmp_path / f'direct{number}')}", pretrained=True).eval()
        assert torch.equal(again(pixels), loaded(pixels))
        assert (
            type(again) is type(loaded) and not any("asvit" in type(m).__module__ for m in again.modules())
        ) or not number


def test_other_names_of_classes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TOPOLOGY, images, out=tmp_path / "run", **{**OPTIONS, "img_size": 32})
    renamed = tmp_path / "images"
    for label, name in enumerate(NAMES):
        (renamed / "val").mkdir(parents=True, exist_ok=True)
        (renamed / "val" / f"other{label}").symlink_to(images / "val" / name)
    with pytest.warns(Warning, match="class 0 is 'other0', the network's is 'class0'"):
        evaluated(capsys, tmp_path / "run", "--data", renamed)


def test_statistics_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As timm's train.py takes them, or with commas."""
    command = ["train", TOPOLOGY, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--img-size", "32"]
    for given in (["0.5", "0.4", "0.3"], ["0.5,0.4,0.3"], ["0.5, 0.4", "0.3"]):
        assert main([*command, "--mean", *given, "--std", "0.25", "--print-config"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert (printed["mean"], printed["std"]) == ([0.5, 0.4, 0.3], [0.25])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"mean": [0.5, 0.4, 0.3], "std": 0.25}))
    assert main([*command, "--config", str(tmp_path / "config.yaml"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == printed
    for wrong, message in (
        (["--mean", "0.5", "0.4"], "mean must be one number or 3, one for each channel, got 2"),
        (["--std", "0", "0.2", "0.2"], "std must be numbers above 0"),
        (["--mean", "grey"], "--mean: expected a number"),
        (["--crop-mode", "diagonal"], "--crop-mode must be one of 'center', 'squash', 'border'"),
    ):
        assert main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
