"""The training loop: phases, options that must not change the numbers, files, and what it says of bad input."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from torch import nn
from training_program import CLASSES, OPTIONS, PLAIN, SIZE, TOPOLOGY, Pictures, run

import asvit_fast as af
from asvit_fast.backends import FallbackWarning
from asvit_fast.errors import InputError
from asvit_fast.training.checkpoint import BEST, LAST
from asvit_fast.training.train import Trainer


def weights(result: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def test_learns_through_all_phases(tmp_path: Path) -> None:
    result = run(tmp_path, epochs=9, schedule="table6-80", **PLAIN, smoothing=0.0, model_ema_decay=0.9)
    assert [row["token_reduction"] for row in result.epochs] == [4, 4, 2, 2, 1, 1, 1, 1, 1]
    losses = [row["train_loss"] for row in result.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert result.top1 > 80 and result.epochs[-1]["ema_top1"] > 80
    assert result.best["token_reduction"] == 1  # however good a coarse phase was on its own grid
    assert (tmp_path / LAST).exists() and (tmp_path / BEST).exists()
    trace = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert trace == result.epochs
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(9))
    assert float(rows[-1]["train_loss"]) == pytest.approx(losses[-1])
    summary = json.loads((tmp_path / "result.json").read_text())
    assert summary["top1"] == result.top1 and summary["saving"] == pytest.approx(result.cost.saving)


def test_finished_run_answers_at_once(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = (tmp_path / LAST).stat().st_mtime_ns
    again = run(tmp_path)
    assert torch.equal(weights(first), weights(again)) and again.epochs == first.epochs
    assert (tmp_path / LAST).stat().st_mtime_ns == before


def test_same_seed_same_bits() -> None:
    first, again, other = run(None), run(None), run(None, seed=4)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize(
    "options",
    [
        {"grad_accum_steps": 2, "batch_size": 4},
        {"grad_accum_steps": 4, "batch_size": 2, "phase_batch_sizes": "4:8,2:4"},
        {"grad_checkpointing": True},
        {"channels_last": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_how_it_runs_does_not_change_what_it_learns(options: dict[str, Any]) -> None:
    expected, found = run(None, **PLAIN), run(None, **PLAIN, **options)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_nothing_compiles_after_the_warm_up(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a phase nor a validation, whose last batch is smaller; and the numbers are those of the eager network."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=compiler))
    counts = []

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def warm_up(self: Trainer, original: Any = Trainer._warm_up) -> None:
        original(self)
        counts.append(graphs())

    options = {**PLAIN, "schedule": "1:2,1:1", "epochs": 2, "model_ema": False}
    data = (Pictures(), Pictures(12, seed=1))
    expected = run(None, data, **options)
    monkeypatch.setattr(Trainer, "_warm_up", warm_up)
    found = run(None, data, **options, torchcompile=True)
    assert counts[0] >= 6 and graphs() == counts[0]
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=2e-4)


def test_automatic_batch_sizes_fit_the_memory_of_full_tokens() -> None:
    """Coarse tokens leave room for larger passes; an update keeps its images."""
    expected = run(None, **PLAIN)
    found = run(None, **PLAIN, batch_size=2, grad_accum_steps=4, phase_batch_sizes="auto")
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype: str) -> None:
    expected = run(None, **PLAIN, epochs=6, schedule="1")
    found = run(None, **PLAIN, epochs=6, schedule="1", amp=True, amp_dtype=dtype)
    assert not torch.equal(weights(found), weights(expected))
    assert found.epochs[-1]["train_loss"] == pytest.approx(expected.epochs[-1]["train_loss"], rel=0.1)


def test_clipping_bounds_the_step() -> None:
    options = {**PLAIN, "opt": "sgd", "lr": 1.0, "weight_decay": 0.0}
    free, clipped = run(None, **options), run(None, **options, clip_grad=1e-6)
    start = torch.cat([p.detach().flatten() for p in fresh().parameters()])
    assert (weights(clipped) - start).norm() < 1e-3 * (weights(free) - start).norm()


def fresh() -> nn.Module:
    torch.manual_seed(OPTIONS["seed"])
    return timm.create_model("asvit", topology=TOPOLOGY, num_classes=CLASSES, img_size=SIZE)


def test_regularizers_change_the_training() -> None:
    plain = run(None, **PLAIN)
    diverse = run(None, **PLAIN, regularizers="patch:0.5,attention:0.5,weight:0.01")
    assert not torch.equal(weights(plain), weights(diverse))


def test_a_network_of_timm_is_retokenized() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )
    result = train_module(model)
    assert [row["token_reduction"] for row in result.epochs] == [4, 2, 1]


def train_module(model: nn.Module) -> Any:
    data = [(nn.functional.interpolate(p.images, size=64), p.targets) for p in (Pictures(16), Pictures(8))]
    return af.train(model, tuple(torch.utils.data.TensorDataset(*part) for part in data), **{**OPTIONS, "img_size": 64})


# ------------------------------------------------------------------ timm's format


def test_timm_reads_our_checkpoints(tmp_path: Path) -> None:
    result = run(tmp_path)
    model = fresh()
    load_checkpoint(model, str(tmp_path / LAST), use_ema=False)
    assert torch.equal(weights(result), torch.cat([p.detach().flatten() for p in model.parameters()]))
    load_checkpoint(model, str(tmp_path / LAST), use_ema=True)
    averaged = torch.cat([p.detach().flatten() for p in result.ema.parameters()])
    assert torch.equal(averaged, torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    assert resume_checkpoint(model, str(tmp_path / LAST), optimizer) == 3
    assert optimizer.state_dict()["state"][0]["exp_avg"].abs().sum() > 0


def test_a_training_of_timm_goes_on_here(tmp_path: Path) -> None:
    model = fresh()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    model(torch.randn(2, 3, SIZE, SIZE)).square().mean().backward()
    optimizer.step()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=50.0)
    result = run(tmp_path / "ours", **PLAIN, resume=str(tmp_path / "last.pth.tar"))
    assert [row["epoch"] for row in result.epochs] == [2]
    with pytest.raises(InputError, match="does not exist"):
        run(None, resume=str(tmp_path / "nothing.pth.tar"))
    for other in ({"model_kwargs": {"attn_scale": True}}, {"layer_decay": 0.7}):
        with pytest.raises(InputError, match="another network or optimizer"):
            run(None, **other, resume=str(tmp_path / "last.pth.tar"))


def test_fine_tuning_starts_from_a_checkpoint(tmp_path: Path) -> None:
    """The same classes keep their classifier, others get a new one, another image size resizes position embeddings."""
    before = run(tmp_path)
    frozen = {**PLAIN, "lr": 1e-12, "warmup_lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0, "model_ema": False}
    again = run(None, **frozen, initial_checkpoint=str(tmp_path))
    torch.testing.assert_close(weights(again), weights(before), rtol=0, atol=1e-6)
    with pytest.warns(FallbackWarning, match="start afresh"):
        other = run(None, **frozen, initial_checkpoint=str(tmp_path / LAST), num_classes=6)
    assert other.model.head.fc2.out_features == 6
    torch.testing.assert_close(other.model.head.fc1.weight, before.model.head.fc1.weight)
    with pytest.raises(InputError, match="do not fit"):
        af.train("vit_tiny_patch16_224", (Pictures(), None), **{**OPTIONS, "initial_checkpoint": str(tmp_path / LAST)})


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "40:4,30:2,230:1"}, "300 epochs"),
        ({"schedule": "1:3"}, "1:3"),
        ({"batch_size": 64}, "batch_size"),
        ({"batch_size": 7}, "even"),
        ({"phase_batch_sizes": "4:3"}, "divide"),
        ({"phase_batch_sizes": "four"}, "phase_batch_sizes"),
        ({"mixup": -1.0}, "mixup"),
        ({"opt": "nonsense"}, "nonsense"),
        ({"sched": "nonsense"}, "nonsense"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"num_classes": 2}, "classes"),
        ({"model_kwargs": {"windows": 3}}, "windows"),
        ({"epochs": 0}, "epochs"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(None, **options)


def test_networks_without_stochastic_depth() -> None:
    """Any network of timm trains with full tokens; what it lacks must be switched off."""
    options = {**OPTIONS, **PLAIN, "schedule": "1", "epochs": 1}
    result = af.train("dla46_c", (Pictures(16), None), **options)
    assert result.epochs[0]["train_loss"] > 0 and result.top1 is None
    with pytest.raises(InputError, match="dla46_c has no stochastic depth"):
        af.train("dla46_c", (Pictures(16), None), **{**options, "drop_path": 0.1})


def test_unknown_network() -> None:
    with pytest.raises(InputError, match="no_such_model"):
        af.train("no_such_model", (Pictures(), None), **OPTIONS)


def test_other_options_do_not_continue_a_run(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match="schedule is"):
        run(tmp_path, schedule="3:1")


@pytest.mark.parametrize("update", [0, 8])
def test_a_loss_that_is_no_number_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """It names the update and the last good checkpoint, which still holds finite weights."""
    from asvit_fast.training.step import Step

    original = Step._loss

    def loss(self: Step, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = original(self, images, targets)
        self.seen = getattr(self, "seen", -1) + 1
        return found * float("nan") if self.seen == update else found

    monkeypatch.setattr(Step, "_loss", loss)
    with pytest.raises(InputError, match=rf"update {update % 6} of epoch {update // 6}") as error:
        run(tmp_path)
    if update == 0:
        assert "no checkpoint has been written yet" in str(error.value)
        return
    assert str(tmp_path / LAST) in str(error.value)
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
