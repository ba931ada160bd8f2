"""Training data: what a batch holds depends on seed, epoch and position alone; what cannot be used is refused."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset
from training_images import CPU, SIZE, Listed, float_images, load, together, write_images

from asvit_fast.errors import InputError
from asvit_fast.recipe import Recipe
from asvit_fast.training.data import Reader, load_data


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


def states() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


# --------------------------------------------------------------------------- seed, epoch, position


def test_batches_are_normalised_images_with_their_classes(images: Path) -> None:
    data = load(images)
    assert (data.num_classes, data.class_names) == (3, ["a", "b", "c"])
    assert (data.train_images, data.images_per_rank, data.has_validation) == (21, 21, True)
    pixels, targets = together(data.train_batches(0, 0, 3))
    assert pixels.shape == (21, 3, SIZE, SIZE) and pixels.dtype == torch.float32
    assert targets.dtype == torch.int64 and targets.bincount().tolist() == [7, 7, 7]
    assert -3 < pixels.mean() < 3 and pixels.std() > 0.3


@pytest.mark.parametrize(("workers", "start", "batch_size"), [(0, 0, 7), (0, 6, 2), (1, 0, 4), (2, 0, 3), (2, 9, 5)])
def test_batches_depend_on_position_alone(images: Path, workers: int, start: int, batch_size: int) -> None:
    expected = together(load(images).train_batches(1, 0, 1))
    found = together(load(images, workers=workers).train_batches(1, start, batch_size))
    assert len(found[1]) == (21 - start) // batch_size * batch_size
    for one, whole in zip(found, expected, strict=True):
        assert torch.equal(one, whole[start : start + len(one)])


def test_workers_that_stay_serve_later_epochs(images: Path) -> None:
    data, alone = load(images, workers=2), load(images)
    abandoned = data.train_batches(0, 0, 3)
    next(abandoned)
    for epoch in (3, 1):
        for one, other in zip(data.train_batches(epoch, 0, 3), alone.train_batches(epoch, 0, 3), strict=True):
            assert torch.equal(one[0], other[0])
    with pytest.raises(RuntimeError, match="given up"):
        next(abandoned)


def test_epochs_and_seeds_differ(images: Path) -> None:
    runs = [
        together(load(images, seed=seed).train_batches(epoch, 0, 3)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert torch.equal(runs[0][0], runs[3][0])
    for other in runs[1:3]:
        assert not torch.equal(runs[0][1], other[1])  # the order
        assert sorted(runs[0][0].sum((1, 2, 3)).tolist()) != sorted(other[0].sum((1, 2, 3)).tolist())  # augmentation


def test_ranks_share_an_epoch(images: Path) -> None:
    """Together they read what one alone would have: 3 ranks x 2 images, 6 images on one."""
    alone = list(load(images).train_batches(2, 0, 6))
    shares = [load(images, rank=rank, ranks=3) for rank in range(3)]
    assert {(data.images_per_rank, data.train_images) for data in shares} == {(7, 21)}
    for (whole, _), *parts in zip(alone, *(data.train_batches(2, 0, 2) for data in shares), strict=True):
        dealt = torch.stack([part for part, _ in parts], dim=1).flatten(0, 1)  # [6, 3, H, W]
        assert torch.equal(dealt, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_left_alone(images: Path, workers: int) -> None:
    before = states()
    data = load(images, workers=workers)
    list(data.train_batches(0, 0, 3))
    list(data.eval_batches(4))
    assert states() == before


def test_global_random_states_do_not_matter(images: Path) -> None:
    data = load(images)
    first = together(data.train_batches(0, 0, 3))[0]
    random.seed(9), torch.manual_seed(9), np.random.seed(9)  # noqa: NPY002
    assert torch.equal(first, together(data.train_batches(0, 0, 3))[0])


def test_erasing_is_of_the_recipe(images: Path) -> None:
    """A rectangle of noise or zeros in about as many images as asked for, and in no others."""
    plain, erased = (
        together(load(images, reprob=reprob, remode="const").train_batches(0, 0, 3))[0] for reprob in (0.0, 0.5)
    )
    changed = (plain != erased).any(1)  # [21, H, W]
    assert 4 <= changed.flatten(1).any(1).sum() <= 17
    assert (erased.permute(0, 2, 3, 1)[changed] == 0).all()
    noise = together(load(images, reprob=1.0, remode="pixel").train_batches(0, 0, 3))[0]
    assert noise[noise != plain].std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("aa", ["rand-m10-n15-inc1", "rand-m0-n15", "v0", "augmix-m10"])
def test_largest_and_smallest_magnitudes(images: Path, aa: str) -> None:
    """Posterize with 0 bits among them, which Pillow 13 refuses."""
    data = load(images, aa=aa)
    for epoch in range(3):
        assert len(list(data.train_batches(epoch, 0, 3))) == 7


def test_no_aug_is_the_same_in_every_epoch(images: Path) -> None:
    data = load(images, no_aug=True)
    first, second = (together(data.train_batches(epoch, 0, 3))[0].sum((1, 2, 3)) for epoch in range(2))
    torch.testing.assert_close(first.sort()[0], second.sort()[0])


# --------------------------------------------------------------------------- validation


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_images_come_once_and_in_order(images: Path, workers: int) -> None:
    data = load(images, workers=workers)
    pixels, targets = together(data.eval_batches(3))
    assert targets.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert torch.equal(together(load(images, seed=1).eval_batches(4))[0], pixels)  # nothing is drawn
    assert data.eval_batch_sizes(3) == (3, 1) and data.eval_batch_sizes(7) == (7,) and data.eval_batch_sizes(9) == (7,)
    shares = [load(images, rank=rank, ranks=2, workers=workers) for rank in range(2)]
    parts = [together(share.eval_batches(3)) for share in shares]
    assert [len(part[1]) for part in parts] == [4, 3]
    assert [share.eval_batch_sizes(3) for share in shares] == [(3, 1), (3,)]
    for rank, part in enumerate(parts):
        assert torch.equal(part[0], pixels[rank::2]) and torch.equal(part[1], targets[rank::2])


def test_more_ranks_than_validation_images(images: Path) -> None:
    held_out = TensorDataset(torch.randn(1, 3, SIZE, SIZE), torch.zeros(1, dtype=torch.int64))
    train = TensorDataset(torch.randn(9, 3, SIZE, SIZE), torch.zeros(9, dtype=torch.int64))
    data = load((train, held_out), rank=1, ranks=2)
    assert list(data.eval_batches(4)) == [] and data.eval_batch_sizes(4) == ()


# --------------------------------------------------------------------------- data sets in place of a path


def test_float_tensors_are_taken_as_they_are() -> None:
    pixels, targets = float_images()
    data = load((TensorDataset(pixels, targets), TensorDataset(pixels[:4], targets[:4])))
    found = together(data.train_batches(0, 0, 3))
    where = (found[0].flatten(1)[:, None] == pixels.flatten(1)).all(2).int().argmax(1)  # [9]: place in the data set
    assert sorted(where.tolist()) == list(range(9)) and torch.equal(targets[where], found[1])
    for other in (
        Listed([(image, int(target)) for image, target in zip(pixels, targets, strict=True)]),
        Subset(TensorDataset(pixels.flip(0), targets.flip(0)), list(range(8, -1, -1))),
    ):
        assert torch.equal(together(load((other, None)).train_batches(0, 0, 3))[0], found[0])
    assert torch.equal(together(data.eval_batches(4))[0], pixels[:4])


def test_tensors_in_memory_are_not_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load((TensorDataset(*float_images()), None), workers=2)
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: pytest.fail("read by itself"))
    assert len(list(data.train_batches(0, 0, 3))) == 3
    assert data.has_validation is False
    with pytest.raises(InputError, match="no validation images"):
        data.eval_batches(3)


def test_pil_and_uint8_images_go_through_the_same_augmentation() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(9)]
    pil = Listed([(Image.fromarray(array), number % 3) for number, array in enumerate(arrays)])
    tensors = Listed([(torch.from_numpy(array).permute(2, 0, 1), number % 3) for number, array in enumerate(arrays)])
    first, second = (together(load((data, data)).train_batches(0, 0, 3))[0] for data in (pil, tensors))
    assert torch.equal(first, second) and first.shape == (9, 3, SIZE, SIZE)


class Jittered(Listed):
    """Draws from all three generators, as people's own transforms do."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return self.samples[index][0] + noise, self.samples[index][1]


def test_random_numbers_of_a_data_set_repeat() -> None:
    pixels, targets = float_images()
    dataset = Jittered([(image, int(target)) for image, target in zip(pixels, targets, strict=True)])
    alone, shared = (load((dataset, None), workers=workers) for workers in (0, 2))
    first = together(alone.train_batches(0, 0, 3))[0]
    assert torch.equal(first, together(shared.train_batches(0, 0, 3))[0])
    assert torch.equal(first[6:], together(alone.train_batches(0, 6, 1))[0])
    assert not torch.equal(first.sum().sort()[0], together(alone.train_batches(1, 0, 3))[0].sum().sort()[0])


# --------------------------------------------------------------------------- other places of images


def test_other_folders(images: Path, tmp_path: Path) -> None:
    """The folder itself, a class map, and hidden folders."""
    alone = load(images / "train", train_split="", val_split="")
    assert alone.train_images == 21 and not alone.has_validation
    names = tmp_path / "names.txt"
    names.write_text("c\nb\nunused\na\n")
    write_images(tmp_path / "data")
    (tmp_path / "data" / "train" / ".cache").mkdir()
    assert load(tmp_path / "data").num_classes == 3
    data = load(tmp_path / "data", class_map=str(names))
    assert (data.num_classes, data.class_names) == (4, ["c", "b", "unused", "a"])
    assert together(data.eval_batches(7))[1].tolist() == [3, 3, 3, 1, 1, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_hold_the_same_images(images: Path, tmp_path: Path, workers: int) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(images / split, arcname=".")
    data = load(tmp_path, workers=workers)
    assert data.num_classes == 3 and data.train_images == 21
    for one, other in zip(data.train_batches(0, 0, 3), load(images).train_batches(0, 0, 3), strict=True):
        assert torch.equal(one[0], other[0])
    assert torch.equal(together(data.eval_batches(3))[0], together(load(images).eval_batches(3))[0])


class Shards(IterableDataset):
    """As timm's streams: the workers share the images, in an order of the epoch."""

    def __init__(self) -> None:
        self.reader = SimpleNamespace(num_samples=40, class_to_idx={str(number): number for number in range(40)})
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        order = np.random.default_rng(self.epoch).permutation(40)
        for number in order[worker.id :: worker.num_workers]:
            yield Image.new("RGB", (40, 40), (int(number) * 6, 0, 99)), int(number)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_repeat_and_continue(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("asvit_fast.training.data.splits.open_split", lambda *arguments, **options: Shards())
    data = load("anywhere", workers=workers)
    whole = together(data.train_batches(1, 0, 4))
    assert sorted(whole[1].tolist()) == list(range(40))
    again = together(load("anywhere", workers=workers).train_batches(1, 12, 7))
    for one, expected in zip(again, whole, strict=True):
        assert len(one) == 28 and torch.equal(one, expected[12:])
    assert not torch.equal(together(data.train_batches(2, 0, 4))[1], whole[1])
    assert [len(targets) for _, targets in data.eval_batches(16)] == [16, 16, 8]
    assert data.eval_batch_sizes(16) == (16, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset(images: Path, tmp_path: Path, workers: int) -> None:
    """The library itself, where it is installed."""
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard}.tar")) as writer:
            for number, path in enumerate(sorted((images / "train").rglob("*.png"))[shard::2]):
                label = "abc".index(path.parent.name)
                writer.write({"__key__": f"{shard}{number}", "jpg": Image.open(path), "cls": label})
    (tmp_path / "_info.json").write_text(
        '{"splits": {"train": {"name": "train", "filenames": ["train-0.tar", "train-1.tar"],'
        ' "shard_lengths": [11, 10], "num_samples": 21}}}'
    )
    recipe = Recipe.of(dataset="wds/x", val_split="", workers=workers, batch_size=3)
    with pytest.raises(InputError, match="give num_classes"):
        load_data(tmp_path, Reader(recipe, SIZE, CPU))

    def batches(epoch: int, start: int) -> tuple[Tensor, Tensor]:
        return together(load_data(tmp_path, Reader(recipe, SIZE, CPU), num_classes=3).train_batches(epoch, start, 3))

    whole, rest = batches(1, 0), batches(1, 6)
    assert len(whole[1]) == 21 and len(rest[1]) == 15
    assert torch.equal(whole[0][6:], rest[0]) and torch.equal(whole[1][6:], rest[1])
    assert not torch.equal(whole[1], batches(2, 0)[1])


@pytest.mark.parametrize("aa", ["", "rand-m9-mstd0.5-inc1"])
def test_grey_images(images: Path, aa: str) -> None:
    recipe = Recipe.of(batch_size=7, workers=0, aa=aa)
    data = load_data(images, Reader(recipe, (32, 48), CPU, in_chans=1))
    assert [tuple(pixels.shape) for pixels, _ in data.train_batches(0, 0, 7)] == [(7, 1, 32, 48)] * 3
    assert next(data.eval_batches(7))[0].mean().abs() < 2
    with pytest.raises(InputError, match="in_chans must be one of 1, 3"):
        load_data(images, Reader(recipe, 32, CPU, in_chans=4))
