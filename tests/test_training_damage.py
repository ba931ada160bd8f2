"""Checkpoints of a training that were cut, flipped or lost; choices that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_program import run

from asvit_fast.backends import FallbackWarning
from asvit_fast.errors import InputError
from asvit_fast.recipe import DetectionRecipe, Recipe
from asvit_fast.run_directory import best_row
from asvit_fast.training.checkpoint import BEST, LAST


def flip(path: Path) -> None:
    """One bit in the middle, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_best_checkpoint_is_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Before anything is trained; nobody is told to go on from it."""
    out = tmp_path / "run"
    run(out)
    last = (out / LAST).read_bytes()
    damage(out / BEST)
    with pytest.raises(InputError, match=f"{BEST} is damaged: restore it, or delete it to go on with {LAST}"):
        run(out)
    (out / LAST).unlink()
    with pytest.raises(InputError, match=f"{LAST} is missing and .*{BEST} is damaged"):
        run(out)
    (out / LAST).write_bytes(last)
    damage(out / LAST)
    with pytest.raises(InputError, match="damaged") as error:
        run(out)
    assert BEST not in str(error.value)


def test_a_lost_best_checkpoint_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    epochs = run(out).epochs
    (out / BEST).unlink()
    if best_row(epochs) is epochs[-1]:
        run(out)
        assert (out / BEST).is_file()
        return
    with pytest.warns(FallbackWarning, match=f"{BEST} is lost: until an epoch is better than epoch"):
        run(out)


def test_flipped_bits_of_weights_are_noticed(tmp_path: Path) -> None:
    """Of checkpoints of ours; the sums of others may be of another kind."""
    run(tmp_path / "run", epochs=1, schedule="1")
    (tmp_path / "run" / LAST).rename(tmp_path / "flipped.pth.tar")
    flip(tmp_path / "flipped.pth.tar")
    with pytest.raises(InputError, match="damaged"):
        run(None, resume=str(tmp_path / "flipped.pth.tar"))
    with pytest.raises(InputError, match="damaged"):
        run(None, initial_checkpoint=str(tmp_path / "flipped.pth.tar"))


def test_choices_without_effect_are_told() -> None:
    assert Recipe().without_effect() == [] and DetectionRecipe().without_effect() == []
    for options, words in (
        ({"amp_dtype": "float16"}, "amp_dtype 'float16' has no effect: it needs amp"),
        ({"lr": 1e-3, "lr_base": 5.0}, "lr_base 5.0 has no effect: it needs no lr"),
        ({"model_ema": False, "model_ema_decay": 0.9}, "model_ema_decay 0.9 has no effect: it needs model_ema"),
        ({"mixup": 0.0, "cutmix": 0.0, "mixup_prob": 0.3}, "mixup_prob 0.3 has no effect: it needs mixup or cutmix"),
        ({"no_aug": True, "reprob": 0.5}, "reprob 0.5 has no effect: it needs augmentation, which no_aug leaves out"),
    ):
        assert Recipe.of(**options).without_effect() == [words]
    assert Recipe.of(amp=True, amp_dtype="float16", reprob=0.5, mixup_prob=0.3).without_effect() == []
    assert "it needs augmentation lsj" in DetectionRecipe.of(augmentation="none", crop_size=512).without_effect()[0]


def test_notes_before_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(None, epochs=1, schedule="1", progress=True, min_lr=0.5, no_aug=True, reprob=0.5)
    said = " ".join(capsys.readouterr())
    assert "Note: reprob 0.5 has no effect" in said and "Note: min_lr 0.5 is above the learning rate" in said
