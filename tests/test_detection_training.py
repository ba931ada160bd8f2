"""Trainings of detectors: exact resume, averages, re-tokenization, evaluation, what stops them."""

from __future__ import annotations

import importlib.machinery
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_program import content, run, run_killed, write_coco, write_split
from test_trackers import Notes

import asvit_fast as af
from asvit_fast.detection import DetectionResult, evaluate_detector, load_detector, open_coco
from asvit_fast.detection.evaluate import measure, to_results
from asvit_fast.detection.training import DETECTIONS, DetectionStep
from asvit_fast.errors import InputError
from asvit_fast.training import WandbTracker
from asvit_fast.training.build import build_from_checkpoint
from asvit_fast.training.checkpoint import LAST

pytest.importorskip("pycocotools")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["asvit_fast.detection"])
TIMES = ("seconds", "train_seconds", "images_per_second")
EVERYTHING: dict[str, Any] = {
    "detector": "cascade_mask_rcnn", "model_ema": True, "drop_path": 0.2, "augmentation": "lsj", "crop_size": 64,
    "schedule": "1:2,1:1", "grad_accum_steps": 2, "clip_grad": 1.0, "layer_decay": 0.9, "norm_decay": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def killed(*arguments: Any) -> None:
    process = CONTEXT.Process(target=run_killed, args=arguments)
    process.start()
    process.join(900)
    assert process.exitcode == -signal.SIGKILL


def rows(result: DetectionResult) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in result.epochs]


def test_killed_and_started_again_it_ends_on_the_same_bits(tmp_path: Path, folder: Path) -> None:
    """In a coarse phase and in the next, in the middle of epochs of three updates of two passes."""
    expected = run(folder, **EVERYTHING)
    for update in (2, 4):
        killed(str(folder), str(tmp_path / "run"), update, EVERYTHING)
        assert torch.load(tmp_path / "run" / LAST, weights_only=True)["asvit_fast"]["position"]["update"] > 0
    found = run(folder, tmp_path / "run", **EVERYTHING, workers=1)
    assert rows(found) == rows(expected)
    for ours, theirs in ((found.model, expected.model), (found.ema, expected.ema)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert [row["token_reduction"] for row in found.epochs] == [2, 1]
    assert {"ap", "mask_ap75", "ema_ap", "ema_mask_ap75"} <= set(found.epochs[-1])


def test_what_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone, for all sizes at once."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append((module, options)))
    result = run(folder, None, epochs=1, torchcompile=True)
    assert calls == [(result.model.backbone, {"dynamic": True})]


def test_callbacks_follow_a_training(folder: Path) -> None:
    notes = Notes()
    result = run(folder, epochs=1, callbacks=[notes])
    assert notes.calls == ["begin", "end", "close"] and notes.rows == result.epochs
    assert notes.rows[0]["ap"] == result.ap and notes.info.model is result.model


def test_run_directory_checkpoint_and_evaluation(tmp_path: Path, folder: Path) -> None:
    """What is loaded finds what was validated, and the folder holds what was found."""
    result = run(folder, tmp_path, epochs=1)
    loaded = load_detector(tmp_path)
    assert (loaded.name, loaded.detector, loaded.categories) == ("asvit", "mask_rcnn", [(3, "c3"), (7, "c7")])
    for (name, a), b in zip(loaded.model.state_dict().items(), result.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    truth = open_coco(str(folder), "val", masks=True)
    batches = [([torch.from_numpy(_pixels(image))], [{"image_id": entry.id}]) for image, entry in truth]
    found = evaluate_detector(loaded.model, batches, truth, masks=True)
    assert found.images == 5
    for name, value in found.measures.items():
        assert result.epochs[-1][name] == pytest.approx(value, abs=1e-9), name
    assert json.loads((tmp_path / DETECTIONS).read_text()) == found.detections
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "detect" and config["recipe"]["lr_base"] == 1e-3
    assert json.loads((tmp_path / "result.json").read_text())["ap"] == result.ap
    with pytest.raises(InputError, match="is a detector's"):
        build_from_checkpoint(tmp_path / LAST)


def _pixels(image: Any) -> Any:
    import numpy as np

    return np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255


def test_perfect_and_wrong_answers(folder: Path) -> None:
    """The truth as an answer has an AP of 100; with wrong classes 0; half of the images, what pycocotools says."""
    truth = open_coco(str(folder), "val", masks=True)
    ids = {entry.id for entry in truth.images}
    answers, wrong = [], []
    for entry in truth.images:
        from asvit_fast.detection.coco import mask_of

        masks = [torch.from_numpy(mask_of(one.entry, entry.height, entry.width)).float()[None] for one in entry.objects]
        output = {
            "boxes": torch.tensor([one.box for one in entry.objects]).reshape(-1, 4),
            "labels": torch.tensor([one.label for one in entry.objects], dtype=torch.int64),
            "scores": torch.ones(len(entry.objects)),
            "masks": torch.stack(masks) if masks else torch.zeros(0, 1, entry.height, entry.width),
        }
        answers += to_results(output, entry.id, truth.categories)
        wrong += to_results({**output, "labels": 3 - output["labels"]}, entry.id, truth.categories)
    measures = measure(answers, truth, ids, masks=True)
    assert {name: measures[name] for name in ("ap", "ap75", "mask_ap")} == pytest.approx(
        {"ap": 100, "ap75": 100, "mask_ap": 100}
    )
    assert "ap_large" not in measures  # there is no large object
    assert measure(wrong, truth, ids, masks=True)["ap"] == 0
    assert measure([], truth, ids, masks=True)["mask_ap"] == 0
    assert 0 < measure(answers[1:], truth, ids, masks=False)["ap"] < 100


def test_crowds_forgive_what_is_found_in_them(tmp_path: Path) -> None:
    file = content(3)
    file["annotations"][1]["iscrowd"] = 1
    write_split(tmp_path, "val", file)
    truth = open_coco(str(tmp_path), "val", masks=False)
    answers = [
        {"image_id": 2, "category_id": one.entry["category_id"], "bbox": one.entry["bbox"], "score": 0.9}
        for one in truth.images[2].objects
    ]
    answers += [{**answers[0], "score": 0.95}] * 3  # all inside the crowd
    answers.append({"image_id": 1, "category_id": 3, "bbox": file["annotations"][0]["bbox"], "score": 0.5})
    assert measure(answers, truth, {0, 1, 2}, masks=False)["ap"] == pytest.approx(100)


def test_initial_weights_of_a_training_of_ours(tmp_path: Path, folder: Path) -> None:
    """Of a classifier: all of its body, nothing of its classes, embeddings resampled as they must be."""
    from detection_program import TOPOLOGY

    network = af.create_model(TOPOLOGY, img_size=64, num_classes=7, pos_embed="absolute")
    torch.save({"state_dict": network.state_dict(), "arch": "asvit"}, tmp_path / "classifier.pth.tar")
    options = {"epochs": 1, "img_size": 32, "val_split": "", "lr": 1e-12, "weight_decay": 0.0, "warmup_lr": 1e-12}
    result = run(folder, None, initial_checkpoint=str(tmp_path / "classifier.pth.tar"), min_lr=1e-12, **options)
    body = result.model.backbone.body  # type: ignore[union-attr]
    for name, value in body.state_dict().items():
        if name != "pos_embed":
            torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=1e-8)
    assert body.pos_embed.shape[1:3] == (8, 8)


def test_a_loss_that_is_no_number(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DetectionStep._loss

    def loss(self: DetectionStep, images: Any, targets: Any) -> Any:
        value = original(self, images, targets)
        calls.append(1)
        return value * float("nan") if len(calls) == 9 else value

    calls: list[int] = []
    monkeypatch.setattr(DetectionStep, "_loss", loss)
    with pytest.raises(InputError, match=r"not finite since update 2 of epoch 1.*last good checkpoint"):
        run(folder, tmp_path)
    assert torch.load(tmp_path / LAST, weights_only=True)["asvit_fast"]["position"]["epoch"] == 1
    calls.clear()
    calls.extend([1] * 20)
    assert len(run(folder, tmp_path).epochs) == 2


def test_an_unreadable_validation_image_is_not_counted(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    (folder / "val" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.png"):
        run(folder, None, epochs=1)
    with pytest.warns(UserWarning, match=r"1\.png"):
        assert run(folder, None, epochs=1, bad_images="skip").ap is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": "yolo"}, "detector must be one of"),
        ({"augmentation": "mosaic"}, "augmentation must be one of"),
        ({"detector_kwargs": {"box_tresh": 1}}, "unknown option box_tresh"),
        ({"batch_size": 99}, "fewer than one"),
        ({"phase_batch_sizes": "auto"}, "must be numbers"),
        ({"max_size": 40}, "max_size must be min_size"),
        ({"mixup": 0.5}, "unknown option mixup"),
        ({"val_split": "test"}, "instances_test"),
        ({"what": "vit_small_patch16_224"}, "strides"),
    ],
)
def test_mistakes(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(folder, None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(tmp_path: Path, folder: Path, parallel: str) -> None:
    """Under torchrun: each image once, rows alike, the checkpoint goes on in one process."""
    options = {"parallel": parallel, "epochs": 2, "batch_size": 2, "model_ema": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = str(Path(__file__).with_name("detection_program.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", program]
    result = subprocess.run(
        [*command, str(folder), str(tmp_path / "run"), json.dumps(options)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    printed = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(printed) == 2 and "ema_ap" in printed[-1]
    with pytest.warns(UserWarning, match="not to the same bits"):
        longer = run(folder, tmp_path / "run", **{**options, "batch_size": 4, "epochs": 3, "parallel": "ddp"})
    assert len(longer.epochs) == 3


def test_trackers_that_refuse_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, not with what is inside of them."""
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def init(**_: Any) -> None:
        raise ValueError("no key\nlog in")

    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(InputError, match=r"log_wandb: wandb cannot begin \(no key log in\)"):
        run(write_coco(tmp_path / "data"), tmp_path / "run", epochs=1, val_split="", callbacks=[WandbTracker()])


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_rcnn"])
def test_a_detector_is_trained_on_for_other_classes(tmp_path: Path, folder: Path, detector: str) -> None:
    """Everything but what predicts classes begins as it was; for the same classes all does."""
    trained = run(folder, tmp_path / "run", detector=detector, epochs=1)
    file = str(tmp_path / "run" / LAST)
    other = tmp_path / "other"
    write_split(other, "train", content(6, categories=(1, 2, 9)))
    still = {"detector": detector, "epochs": 1, "lr": 1e-12, "min_lr": 1e-12, "weight_decay": 0.0}
    same = run(folder, None, initial_checkpoint=str(tmp_path / "run"), **still).model.state_dict()
    with pytest.warns(UserWarning, match="of other classes"):
        found = run(other, None, initial_checkpoint=file, **still, val_split="").model.state_dict()
    for name, before in trained.model.state_dict().items():
        torch.testing.assert_close(same[name], before)
        if found[name].shape == before.shape:
            torch.testing.assert_close(found[name], before)
        else:
            assert "_predictor." in name, name


def test_another_detector_is_no_initial_checkpoint(tmp_path: Path, folder: Path) -> None:
    run(folder, tmp_path / "run", detector="faster_rcnn", epochs=1)
    with pytest.raises(InputError, match="another detector"):
        run(folder, None, initial_checkpoint=str(tmp_path / "run" / LAST))


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model_best"):
        run(write_coco(tmp_path / "data"), tmp_path / "run", initial_checkpoint=str(tmp_path))
