"""A training goes on with other processes, other passes, after SIGTERM: the same images in the same updates."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_program import PLAIN, Pictures, run, run_killed, run_stalling, run_with_workers

from asvit_fast.backends import FallbackWarning
from asvit_fast.errors import InputError
from asvit_fast.training.checkpoint import BEST, LAST, TrainState
from asvit_fast.training.resume import check_same_stream
from asvit_fast.training.step import Step
from asvit_fast.training.train import Trainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["asvit_fast.training"])
TESTS = Path(__file__).parent
PROGRAM = str(TESTS / "training_program.py")
TWELVE = {**PLAIN, "epochs": 2, "schedule": "1:2,1:1", "checkpoint_interval": 1}  # images an update, of 48


def start(processes: int, out: Path, options: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(ranks if processes > 1 else []), PROGRAM, str(out), "--options", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]


def entry(out: Path) -> dict[str, Any]:
    return torch.load(out / LAST, weights_only=True)["asvit_fast"]


def assert_same_curve(found: Path, expected: Path) -> None:
    """Sums over ranks round differently, no more: an image too many or too few would show."""
    assert [row["epoch"] for row in rows(found)] == [row["epoch"] for row in rows(expected)]
    for row, one in zip(rows(found), rows(expected), strict=True):
        assert row["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    ours, theirs = (torch.load(out / LAST, weights_only=True)["state_dict"] for out in (found, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    run(out, **TWELVE, batch_size=12)
    return out


def die(out: Path, update: int, options: dict[str, Any]) -> None:
    """One process, up to an update."""
    process = CONTEXT.Process(target=run_killed, args=(str(out), update, None, options))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def terminate_when_stalled(out: Path, process: Any) -> None:
    """SIGTERM as soon as the training stalls; it must not take longer than what waits for it would."""
    until = time.monotonic() + 120
    while not Path(f"{out}.stalls").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    process.join(60) if hasattr(process, "join") else process.communicate(timeout=60)


@pytest.mark.slow
def test_other_numbers_of_processes(tmp_path: Path, whole: Path) -> None:
    """Four updates an epoch, of which the first two run in one process, the third in three, the next two in two."""
    die(tmp_path, 2, {**TWELVE, "batch_size": 12})
    for processes, update in ((3, 3), (2, 5)):
        Path(f"{tmp_path}.died").unlink(missing_ok=True)
        process = start(processes, tmp_path, {**TWELVE, "batch_size": 12 // processes}, "--die-at", str(update))
        assert finish(process)[0] != 0
        assert entry(tmp_path)["position"]["update"] == update % 4
        assert len(entry(tmp_path)["losses"]) == processes
    with pytest.warns(FallbackWarning, match="processes 2 -> 1, batch_size 6 -> 12"):
        run(tmp_path, **TWELVE, batch_size=12)
    assert_same_curve(tmp_path, whole)


def test_other_passes(tmp_path: Path, whole: Path) -> None:
    """Requests on resuming count: smaller passes where memory has run out, in each phase."""
    die(tmp_path, 2, {**TWELVE, "batch_size": 12})
    with pytest.warns(FallbackWarning, match="grad_accum_steps 1 -> 3"):
        run(tmp_path, **TWELVE, batch_size=4, grad_accum_steps=3, phase_batch_sizes="1:6")
    assert entry(tmp_path)["batch_sizes"] == {2: 4, 1: 6}
    assert_same_curve(tmp_path, whole)


@pytest.mark.parametrize(
    ("where", "at", "position", "options"),
    [
        ("training", 30, (0, 3), {}),
        ("training", 30, (0, 3), {"workers": 1}),
        ("training", 54, (1, 0), {"batch_size": 4, "grad_accum_steps": 2}),
        ("validation", 9, (0, 6), {}),
        ("update", 8, (1, 2), {}),
    ],
    ids=str,
)
def test_sigterm(tmp_path: Path, where: str, at: int, position: tuple[int, int], options: dict[str, Any]) -> None:
    """A checkpoint of that moment, the shell's exit code, no data worker left; then the same bits."""
    out, options = tmp_path / "run", {"checkpoint_interval": 0, "epochs": 2, "schedule": "1:2,1:1", **options}
    process = CONTEXT.Process(target=run_stalling, args=(str(out), where, at, options))
    process.start()
    terminate_when_stalled(out, process)
    assert process.exitcode == 128 + signal.SIGTERM
    kept = tuple(entry(out)["position"][name] for name in ("epoch", "update"))
    assert kept <= position if "workers" in options else kept == position  # workers read ahead
    found, expected = run(out, **options), run(None, **options)
    for (name, value), other in zip(
        found.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert [row["train_loss"] for row in found.epochs] == [row["train_loss"] for row in expected.epochs]


@pytest.mark.slow
def test_sigterm_of_torchrun(tmp_path: Path, whole: Path) -> None:
    """Which passes it on: one rank cannot read on, the other waits for it, both keep the last whole update."""
    process = start(2, tmp_path, {**TWELVE, "checkpoint_interval": 0, "batch_size": 6}, "--stall-at", "16")
    terminate_when_stalled(tmp_path, process)
    assert entry(tmp_path)["position"]["update"] == 2
    with pytest.warns(FallbackWarning, match="processes 2 -> 1"):
        run(tmp_path, **TWELVE, batch_size=12)
    assert_same_curve(tmp_path, whole)


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    run(tmp_path, epochs=1, schedule="1")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_workers_end_with_a_killed_parent(tmp_path: Path, method: str) -> None:
    process = CONTEXT.Process(target=run_with_workers, args=(method, str(tmp_path / "pids")))
    process.start()
    until = time.monotonic() + 120
    while not (tmp_path / "pids").exists():
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.join()
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    until = time.monotonic() + 10
    while any(map(lives, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [worker for worker in workers if lives(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert len(workers) == 2 and not left


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------ more epochs, lost files


def test_more_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace and the log say what changed; the epochs before stay, those after have the longer training's rates."""
    short = {**PLAIN, "schedule": "1:2,1:1", "sched": "cosine"}
    first = run(tmp_path, **short, epochs=2)
    longer = run(tmp_path, **short, epochs=3, progress=True)
    assert "epochs 2 -> 3" in capsys.readouterr().err
    assert longer.epochs[:2] == first.epochs and [row["token_reduction"] for row in longer.epochs] == [2, 1, 1]
    assert rows(tmp_path)[2]["changed"]["epochs"] == [2, 3]
    whole = run(None, **short, epochs=3)
    assert longer.epochs[2]["lr"] == whole.epochs[2]["lr"] != first.epochs[-1]["lr"]
    assert json.loads((tmp_path / "result.json").read_text())["epochs"] == 3
    assert run(tmp_path, **short, epochs=3).epochs == longer.epochs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, "2 epochs are trained already"),
        ({"epochs": 6, "schedule": "0.5:2,0.5:1"}, "epoch 1 was trained with token reduction 1"),
        ({"batch_size": 12}, "images_per_update must stay 8"),
        ({"smoothing": 0.0}, "smoothing is"),
    ],
    ids=str,
)
def test_what_cannot_go_on(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    known = {**PLAIN, "epochs": 2, "schedule": "1:2,1:1"}
    run(tmp_path, **known)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path, **{**known, "schedule": "1" if options == {"epochs": 1} else "1:2,1:1", **options})
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_lost_checkpoint(tmp_path: Path) -> None:
    """The best one takes its place; without that, what is on record stays."""
    expected = run(tmp_path / "run")
    (tmp_path / "run" / LAST).unlink()
    with pytest.warns(FallbackWarning, match="missing"):
        found = run(tmp_path / "run")
    for (name, value), other in zip(
        found.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    content = (tmp_path / "run" / LAST).read_bytes()
    (tmp_path / "run" / LAST).unlink()  # which may be the best one, too
    (tmp_path / "run" / LAST).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"damaged.*delete it to go on from {BEST}"):
        run(tmp_path / "run")
    for name in (LAST, BEST):
        (tmp_path / "run" / name).unlink()
    trace = (tmp_path / "run" / "trace.jsonl").read_bytes()
    with pytest.raises(InputError, match="missing"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "trace.jsonl").read_bytes() == trace


def test_a_checkpoint_inside_an_epoch_is_resumed_with_its_own_images(tmp_path: Path) -> None:
    die(tmp_path / "run", 9, {})
    checkpoint = str(tmp_path / "run" / LAST)
    for options, message in (
        ({"batch_size": 4}, "images_per_update 8, not 4"),
        ({"seed": 5}, "seed 3, not 5"),
        ({"schedule": "2:4,1:1"}, "token_reduction 2, not 4"),
        ({"epochs": 1, "schedule": "1"}, "1 epochs behind it"),
    ):
        with pytest.raises(InputError, match=message):
            run(None, **options, resume=checkpoint)
    assert [row["epoch"] for row in run(None, resume=checkpoint).epochs] == [1, 2]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("position", "update"), -1),
        (("position", "update"), 7),
        (("position", "epoch"), "1"),
        (("position",), None),
        (("losses",), [float("nan")]),
        (("batch_sizes",), {2: 0}),
        (("random",), [{"torch": 5}]),
        (("random",), []),
        ((), "nonsense"),
    ],
    ids=str,
)
def test_wrongly_typed_fields(tmp_path: Path, begun: Path, path: tuple[str, ...], value: Any) -> None:
    state = torch.load(begun, weights_only=True)
    inside = {"asvit_fast": state["asvit_fast"]}
    owner: Any = inside
    for name in ("asvit_fast", *path)[:-1]:
        owner = owner[name]
    owner[("asvit_fast", *path)[-1]] = value
    torch.save({**state, **inside}, tmp_path / "changed.pth.tar")
    with pytest.raises(InputError, match="damaged") as error:
        run(None, resume=str(tmp_path / "changed.pth.tar"))
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("betas", "none"), ("lr", "high"), ("eps", [1]), ("params", 3)])
def test_wrongly_typed_optimizers(tmp_path: Path, begun: Path, name: str, value: Any) -> None:
    state = torch.load(begun, weights_only=True)
    state["optimizer"]["param_groups"][0][name] = value
    torch.save(state, tmp_path / "changed.pth.tar")
    with pytest.raises(InputError, match="another network or optimizer") as error:
        run(None, resume=str(tmp_path / "changed.pth.tar"))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begun") / "run"
    die(out, 9, {})
    return out / LAST


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by an update whose own loss is fine, and not because an image cannot be read right after it."""
    original = Step._clip

    def clip(self: Step) -> None:
        original(self)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4:
            next(self.model.parameters()).grad.fill_(float("nan"))

    monkeypatch.setattr(Step, "_clip", clip)
    with pytest.raises(InputError, match="update 3 of epoch 0"):
        run(tmp_path)
    kept = torch.load(tmp_path / LAST, weights_only=True)
    assert kept["asvit_fast"]["position"]["update"] == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    with pytest.raises(InputError, match="not finite"):
        run(tmp_path / "unreadable", (BreaksAfter(33), None), checkpoint_interval=0)
    assert not (tmp_path / "unreadable" / LAST).exists()


class BreaksAfter(Pictures):
    def __init__(self, reads: int) -> None:
        super().__init__()
        self.left = reads

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise OSError("broken")
        return super().__getitem__(index)


def test_streams_go_on_with_the_processes_that_share_them(begun: Path) -> None:
    """In the middle of an epoch; others would read other images."""
    entry = TrainState.of(torch.load(begun, weights_only=True))
    assert entry is not None and entry.update > 0
    check_same_stream(entry, True, 1, 0)
    check_same_stream(entry, False, 2, 3)
    check_same_stream(dataclasses.replace(entry, update=0), True, 2, 3)
    for ranks, workers, message in ((2, 0, "1 processes share"), (1, 2, "0 workers share")):
        with pytest.raises(InputError, match=message):
            check_same_stream(entry, True, ranks, workers)


def test_refused_files_come_without_unsafe_advice(tmp_path: Path) -> None:
    """TorchScript, too, for which torch has advice of its own."""
    run(tmp_path / "run", epochs=1, schedule="1")
    for path in (tmp_path / "script.pth", tmp_path / "run" / LAST):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    for options in ({"resume": str(tmp_path / "script.pth")}, {"initial_checkpoint": str(tmp_path / "script.pth")}):
        with pytest.raises(InputError) as error:
            run(None, **options)
        assert "weights_only" not in str(error.value)
    with pytest.raises(InputError, match="damaged") as error:
        run(tmp_path / "run", epochs=1, schedule="1")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("top1", "high"), ("epoch", 0.5), ("seconds", None), ("train_loss", [1])])
def test_wrongly_typed_rows(tmp_path: Path, name: str, value: Any) -> None:
    options = {"epochs": 1, "schedule": "1"}
    run(tmp_path, **options)
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({**json.loads(trace.read_text()), name: value}) + "\n")
    with pytest.raises(InputError, match=rf"trace\.jsonl, line 1: {name} must be"):
        run(tmp_path, **options)


def test_what_a_training_says_of_itself(tmp_path: Path) -> None:
    result = run(tmp_path, epochs=1, schedule="1")
    assert repr(result).startswith("TrainResult(epochs=1, schedule='1:1', train_loss=") and len(repr(result)) < 250
    assert "\n" not in repr(result) and "Conv2d" not in repr(result)
    assert json.loads(json.dumps(result.to_dict()))["epochs"] == result.epochs
    assert "<th>schedule</th><td>&#x27;1:1&#x27;</td>" in result._repr_html_()
    assert repr(run(None, (Pictures(), None), epochs=1, schedule="1"))


def test_compiling_leaves_the_limit_of_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr(Trainer, "_warm_up", lambda self: limits.append(torch._dynamo.config.recompile_limit))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    with torch._dynamo.config.patch(recompile_limit=8):
        run(None, epochs=1, schedule="1", torchcompile=True)
        assert torch._dynamo.config.recompile_limit == 8 < limits[0]
