"""COCO's format: what is taken, what is left out with a warning, what is refused, images that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_program import content, run, write_coco, write_split
from PIL import Image

from asvit_fast.detection import open_coco
from asvit_fast.detection.coco import mask_of
from asvit_fast.detection.data import DetectionData, make_augmentation, make_reader
from asvit_fast.errors import InputError
from asvit_fast.recipe import DetectionRecipe

coco_mask = pytest.importorskip("pycocotools.mask")
CPU = torch.device("cpu")
Change = Callable[[dict[str, Any]], None]


def changed(folder: Path, change: Change) -> Path:
    """The folder of three images (without, with one, with two objects), its annotations changed."""
    file = content(3)
    write_split(folder, "train", file)
    change(file)
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(file))
    return folder


def data(folder: Path, **options: Any) -> DetectionData:
    recipe = DetectionRecipe.of(**{"val_split": "", "workers": 0, "augmentation": "none", "hflip": 0.0, **options})
    return DetectionData(str(folder), make_reader(recipe, CPU), masks=True)


def update(index: int, **values: Any) -> Change:
    return lambda file: file["annotations"][index].update(values)


def test_objects_and_their_masks(tmp_path: Path) -> None:
    """Ids of categories with holes become classes 1, 2; an image without objects counts."""
    images = open_coco(str(changed(tmp_path, lambda file: None)), "train", masks=True)
    assert images.categories == [(3, "c3"), (7, "c7")]
    assert [len(entry.objects) for entry in images.images] == [0, 1, 2]
    first, second = images.images[2].objects
    assert (first.label, second.label) == (1, 2)
    mask = mask_of(second.entry, 40, 56)
    left, top, right, bottom = map(int, second.box)
    assert mask[top:bottom, left:right].all() and mask.sum() == (right - left) * (bottom - top)
    assert images.warning == ""


def test_run_lengths_are_masks(tmp_path: Path) -> None:
    drawn = np.zeros((40, 56), dtype=np.uint8)
    drawn[10:20, 5:30] = 1
    compressed = coco_mask.encode(np.asfortranarray(drawn))
    text = {"size": [40, 56], "counts": compressed["counts"].decode()}
    runs = {"size": [40, 56], "counts": [5 * 40 + 10, *[10, 30] * 24, 10, 56 * 40 - 29 * 40 - 20]}
    for segmentation in (text, runs):
        folder = changed(tmp_path / str(len(segmentation["counts"])), update(2, segmentation=segmentation))
        entry = open_coco(str(folder), "train", masks=True).images[2]
        assert np.array_equal(mask_of(entry.objects[1].entry, 40, 56), drawn)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (update(1, bbox=[4, 6, 0, 16]), "1 boxes without a part inside"),
        (update(1, bbox=[4, 6, 10, -3]), "1 boxes without a part inside"),
        (update(1, bbox=[100, 6, 10, 10]), "1 boxes without a part inside"),
        (update(1, segmentation=[[1, 1, 9, 9]]), "1 segmentations without a polygon of three points"),
        (update(1, segmentation=[]), "1 segmentations without a polygon of three points"),
    ],
)
def test_what_is_no_object_is_left_out(tmp_path: Path, change: Change, left: str) -> None:
    images = open_coco(str(changed(tmp_path, change)), "train", masks=True)
    assert left in images.warning and "instances_train.json" in images.warning
    assert [len(entry.objects) for entry in images.images] == [0, 1, 1]


def test_a_polygon_of_two_points_beside_a_good_one(tmp_path: Path) -> None:
    good = [4, 6, 20, 6, 20, 20]
    images = open_coco(str(changed(tmp_path, update(1, segmentation=[[1, 1, 9, 9], good]))), "train", masks=True)
    assert images.images[2].objects[0].entry["segmentation"] == [good] and images.warning == ""


def test_boxes_end_at_the_border(tmp_path: Path) -> None:
    images = open_coco(str(changed(tmp_path, update(1, bbox=[-5, 30, 20, 40]))), "train", masks=True)
    assert images.images[2].objects[0].box == (0, 30, 15, 40)


def test_crowds_are_not_learnt(tmp_path: Path) -> None:
    folder = changed(tmp_path, update(1, iscrowd=1))
    targets = next(data(folder).train_batches(0, 0, 3))[1]
    assert sorted(len(target["boxes"]) for target in targets) == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (update(0, image_id=99), "1 annotations are of images that it does not have: annotation 1 has image_id 99"),
        (update(0, category_id=4), "1 annotations are of categories that it does not have"),
        (update(1, id=1), "two annotations have the id 1"),
        (lambda file: file["images"][1].update(id=0), "two images have the id 0"),
        (lambda file: file["categories"][1].update(id=3), "two categories have the id 3"),
        (update(0, bbox=[1, 2, 3]), "bbox of four numbers"),
        (update(0, bbox=[1, 2, 3, "x"]), "bbox of four numbers"),
        (update(0, segmentation={"size": [9, 9], "counts": [81]}), r"is of \[9, 9\] pixels, its image of \[64, 48\]"),
        (update(0, segmentation={"size": [64, 48], "counts": [7]}), "runs of 7 pixels, its image 3072"),
        (update(0, segmentation={"size": 64, "counts": [3072]}), r"is of 64 pixels, its image of \[64, 48\]"),
        (update(0, segmentation={"size": [64, 48], "counts": ["a"]}), "counts that are no run lengths"),
        (update(0, segmentation={"size": [64, 48], "counts": [-5, 3077]}), "counts that are no run lengths"),
        (update(0, segmentation={"size": [64, 48], "counts": "garbage"}), "counts that are no run lengths|has runs of"),
        (update(0, segmentation={"size": [64, 48], "counts": "no\u20ac"}), "counts that are no run lengths"),
        (update(0, image_id=[1]), r"has image_id \[1\]"),
        (update(0, category_id={}), r"has category_id \{\}"),
        (update(0, segmentation=None), "train a detector without masks"),
        (update(0, segmentation=[[1, 2, 3]]), "must be polygons"),
        (lambda file: file["images"][0].pop("height"), "image 0 must have a height"),
        (lambda file: file["images"][0].update(file_name="gone.png"), "1 of its images are missing.*gone.png"),
        (lambda file: file.update(categories=[]), "holds no categories"),
        (lambda file: file.update(images=3), "images must be a list"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    """Before any work, in one line that names the file."""
    with pytest.raises(InputError, match=message) as error:
        open_coco(str(changed(tmp_path, change)), "train", masks=True)
    assert "instances_train.json" in str(error.value) and "\n" not in str(error.value)


def test_boxes_need_no_masks(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda file: [one.pop("segmentation") for one in file["annotations"]])
    assert len(open_coco(str(folder), "train", masks=False).images[2].objects) == 2


def test_finding_the_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "gone", "is no folder"), (tmp_path / "empty", "there are none")):
        with pytest.raises(InputError, match=message):
            open_coco(str(folder), "train", masks=False)
    write_split(tmp_path / "coco", "train2017", content(3))
    found = open_coco(str(tmp_path / "coco"), "train", masks=True)
    assert found.images[0].path == tmp_path / "coco" / "train2017" / "0.png"
    write_split(tmp_path / "coco", "train2014", content(3))
    with pytest.raises(InputError, match=r"several: instances_train2014\.json, instances_train2017\.json"):
        open_coco(str(tmp_path / "coco"), "train", masks=True)
    (tmp_path / "coco" / "annotations" / "instances_bad.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_coco(str(tmp_path / "coco"), "bad", masks=True)


def test_coco_detection_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import CocoDetection

    folder = write_coco(tmp_path)
    split = [
        CocoDetection(folder / name, folder / "annotations" / f"instances_{name}.json") for name in ("train", "val")
    ]
    assert open_coco(split[0], "", masks=True).images == open_coco(str(folder), "train", masks=True).images
    with pytest.raises(InputError, match="CocoDetection, got list"):
        open_coco([1], "", masks=True)


def test_a_data_set_alone_is_not_validated_on_itself(tmp_path: Path) -> None:
    from torchvision.datasets import CocoDetection

    write_coco(tmp_path)
    alone = CocoDetection(tmp_path / "train", tmp_path / "annotations" / "instances_train.json")
    with pytest.raises(InputError, match="give a pair"):
        run(alone, epochs=1)
    assert run(alone, epochs=1, val_split="").ap is None


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a topology, a name or a module, got NoneType"):
        run(write_coco(tmp_path), what=None)


def test_splits_agree_and_have_something_to_find(tmp_path: Path) -> None:
    write_split(tmp_path, "train", content(3))
    write_split(tmp_path, "val", content(3, categories=(3, 8)))
    with pytest.raises(InputError, match="other categories"):
        data(tmp_path, val_split="val")
    write_split(tmp_path, "val", content(1))
    with pytest.raises(InputError, match="no object to find"):
        data(tmp_path, val_split="val")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_images_of_other_kinds(tmp_path: Path, mode: str) -> None:
    folder = changed(tmp_path, lambda file: None)
    path = folder / "train" / "1.png"
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        other = Image.fromarray(grey) if mode == "I;16" else image.convert(mode)
    other.save(path, "TIFF" if mode == "CMYK" else "PNG")
    images = next(data(folder).train_batches(0, 0, 3))[0]
    assert all(image.shape[0] == 3 and image.min() >= 0 and image.max() <= 1 for image in images)
    assert max(image.max() for image in images) > 0.5


def test_an_image_of_another_size_than_it_says(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda file: file["images"][1].update(height=60))
    with pytest.raises(InputError, match=r"1.png.*48 x 64 pixels.*says 48 x 60"):
        list(data(folder).train_batches(0, 0, 3))


def test_short_sides_of_multiscale_training() -> None:
    """Steps of 32 pixels, and the largest in any case."""
    augmentation: Any = make_augmentation(DetectionRecipe.of(augmentation="multiscale", scales=(480, 800)))
    (resize,) = [step for step in augmentation.transforms if hasattr(step, "min_size") and hasattr(step, "max_size")]
    assert list(resize.min_size) == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize("augmentation", ["lsj", "multiscale"])
def test_thin_images(tmp_path: Path, augmentation: str) -> None:
    """Whatever their shape, a pixel of each side stays."""
    file = content(1)
    file["images"][0].update(height=2, width=600)
    write_split(tmp_path, "train", file)
    loaded = data(tmp_path, augmentation=augmentation, crop_size=64, scales=(32, 64), min_size=32, max_size=96)
    for epoch in range(3):
        assert min(next(loaded.train_batches(epoch, 0, 1))[0][0].shape) >= 1


def test_compressed_run_lengths_of_every_kind(tmp_path: Path) -> None:
    """What pycocotools packs is taken: long runs, short ones, a mask that begins with an object."""
    generator = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        drawn = (generator.random((64, 48)) < share).astype(np.uint8)
        packed = coco_mask.encode(np.asfortranarray(drawn))
        entry = {"size": [64, 48], "counts": packed["counts"].decode()}
        images = open_coco(str(changed(tmp_path, update(0, segmentation=entry))), "train", masks=True)
        assert np.array_equal(mask_of(images.images[1].objects[0].entry, 64, 48), drawn)


@pytest.mark.parametrize("augmentation", ["lsj", "multiscale"])
def test_augmentation_depends_on_seed_epoch_and_index(tmp_path: Path, augmentation: str) -> None:
    folder = write_coco(tmp_path)
    options = {
        "augmentation": augmentation,
        "crop_size": 64,
        "scales": (32, 64),
        "min_size": 32,
        "max_size": 96,
        "hflip": 0.5,
    }
    ours, theirs = data(folder, **options), data(folder, **options, workers=1)
    whole = list(ours.train_batches(1, 0, 4))
    rest = list(theirs.train_batches(1, 4, 2))
    images = [image for batch in whole for image in batch[0]]
    targets = [one for batch in whole for one in batch[1]]
    for index, (image, target) in enumerate((i, t) for batch in rest for i, t in zip(*batch, strict=True)):
        assert torch.equal(image, images[4 + index])
        for name, value in target.items():
            assert torch.equal(value, targets[4 + index][name])
    other = [image for batch in ours.train_batches(2, 0, 4) for image in batch[0]]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(images, other, strict=True))
    for image, target in zip(images, targets, strict=True):
        if augmentation == "lsj":
            assert image.shape == (3, 64, 64)
        else:
            assert min(image.shape[1:]) in (32, 64) and max(image.shape[1:]) <= 96
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        assert len(target["labels"]) == len(target["boxes"])
        for (left, top, right, bottom), mask in zip(target["boxes"], target["masks"], strict=True):
            assert 0 <= left < right <= image.shape[2] and 0 <= top < bottom <= image.shape[1]
            rows, columns = mask.nonzero(as_tuple=True)
            if len(rows):  # the mask goes where its box goes
                assert rows.min() >= top - 2 and rows.max() <= bottom + 1
                assert columns.min() >= left - 2 and columns.max() <= right + 1


def test_a_corrupt_image_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The training stops with the file's name and what it has learnt, or skips it; repaired, it ends as ever."""
    folder = write_coco(tmp_path / "data")
    expected = run(folder, tmp_path / "whole", epochs=1, val_split="")
    victim = folder / "train" / "7.png"
    good = victim.read_bytes()
    victim.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"7\.png.*cannot be read.*bad_images=skip"):
        run(folder, tmp_path / "run", epochs=1, val_split="")
    with pytest.warns(UserWarning, match=re.escape("7.png")):
        run(folder, None, epochs=1, val_split="", bad_images="skip")
    victim.write_bytes(good)
    found = run(folder, tmp_path / "run", epochs=1, val_split="")
    for (name, a), b in zip(found.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
