"""`asvit-fast tune` without a GPU: the search with times that are made up, the table, resuming, what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_versions

pytest.importorskip("triton")

from asvit_fast.bench import tuning
from asvit_fast.bench.tuning import Comparison, Task, UserTable, neighbours, refine, tasks_of, tune
from asvit_fast.bench.workloads import (
    AttentionWorkload,
    EmbedWorkload,
    MergeWorkload,
    default_workloads,
    topology_workloads,
)
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.kernels import tile_table
from asvit_fast.topology import Topology

START = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
FEATURES = (("bits", 32), ("tokens", 784), ("block_d", 16))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASVIT_FAST_TILES", str(tmp_path))
    tile_table.forget()
    yield tmp_path
    tile_table.forget()


def seconds(options: dict[str, int]) -> float:
    """A valley: fastest with blocks of 128 x 32 and 8 warps."""
    ideal = START | {"block_m": 128, "block_n": 32, "num_warps": 8}
    return 1.0 + sum(abs(options[name] / ideal[name] - 1) for name in ideal)


# --------------------------------------------------------------------------- the search


def test_neighbours():
    found = list(neighbours({"block_m": 16, "num_warps": 8, "num_stages": 2}))
    assert found == [
        {"block_m": 32, "num_warps": 8, "num_stages": 2},
        {"block_m": 16, "num_warps": 4, "num_stages": 2},
        {"block_m": 16, "num_warps": 8, "num_stages": 1},
        {"block_m": 16, "num_warps": 8, "num_stages": 3},
    ]


def test_refine_walks_down_the_valley():
    shown: list[tuple] = []
    found = refine(START, lambda best, new: seconds(new) / seconds(best), 100, lambda *pair: shown.append(pair))
    assert found.tiles == START | {"block_m": 128, "block_n": 32, "num_warps": 8}
    assert found.speed == pytest.approx(seconds(START) / seconds(found.tiles))
    assert found.refused == 0
    assert found.tried == len(shown) == len({str(candidate) for candidate, _ in shown})  # none twice
    assert shown[0][1] == START


def test_refine_stops_and_refuses():
    assert refine(START, lambda best, new: None) == tuning.Found(START, 1.0, 8, 8)
    assert refine(START, lambda best, new: 0.99) == tuning.Found(START, 1.0, 8, 0)  # within the noise
    assert refine(START, lambda best, new: 0.5, limit=5).tried == 5
    flattering = refine(START, lambda best, new: 1.2 if best == START and new["num_warps"] == 8 else 0.9, limit=3)
    assert flattering.tiles == START or flattering.speed > 1.0
    times = iter([0.9] * 3 + [1.0] * 100)  # three wins that the last comparison does not confirm
    assert refine(START, lambda best, new: next(times), limit=3) == tuning.Found(START, 1.0, 3, 0)


# --------------------------------------------------------------------------- what is tuned


def attention(img_size: int = 224) -> list[AttentionWorkload]:
    return [w for w in default_workloads(img_size, ["window_attention"]) if isinstance(w, AttentionWorkload)]


def check_tasks(tasks: list[Task]) -> None:
    assert len({(task.kernel, task.features) for task in tasks}) == len(tasks)
    assert {dict(task.features)["bits"] for task in tasks} == {16, 32}
    for task in tasks:
        half = [w.dtype for w in task.workloads if w.bits == 16]
        assert half.count("fp16") == (1 if half else 0)
        for w in task.workloads:
            assert task.kernel in w.kernels and tuple(w.features(task.kernel).items()) == task.features


def test_default_workloads():
    assert {w.tokens for w in attention()} == {49, 196, 784, 343, 392}
    assert {w.head_dim for w in attention()} == {4, 8, 16, 22, 29, 32, 45}
    tasks = tasks_of(attention(), ("bf16", "fp16", "fp32"))
    check_tasks(tasks)
    assert {task.kernel for task in tasks} == {
        "single_tile", "single_tile_backward", "tiled", "tiled_backward", "bias_gradient"
    }  # fmt: skip


def test_every_kernel_with_tiles_is_tuned():
    tasks = tasks_of(default_workloads(), ("bf16", "fp16", "fp32"))
    check_tasks(tasks)
    shipped = tile_table.read_table(Path(tile_table.__file__).with_name("tiles") / "hopper.json")
    assert {task.kernel for task in tasks} == set(shipped)
    for task in tasks:  # rows are told apart by what the shipped ones are
        features = {
            name for name in shipped[task.kernel][0] if not name.startswith(("block_m", "block_n", "block_k", "num_"))
        }
        assert {name for name, _ in task.features} - {"axes"} == features  # only kernels of three axes say so


def test_workloads_of_patch_embedding_and_merging():
    networks = default_workloads(names=["patch_embed", "patch_merge"])
    embeds = {(w.patch, w.channels) for w in networks if isinstance(w, EmbedWorkload)}
    merges = {(w.kernel, w.channels, w.outputs, w.size) for w in networks if isinstance(w, MergeWorkload)}
    assert embeds == {(8, 32), (8, 88), (8, 116), (8, 180), (4, 96)}
    assert {(4, 32, 64, 56), (4, 64, 128, 28), (4, 128, 256, 14), (2, 96, 192, 56), (2, 384, 768, 14)} <= merges
    wide = topology_workloads(Topology.parse("8,2,3|4,1,2|4,1,4|4,1,6|32,520"), 224, ["patch_embed"])
    assert wide == []  # wider than the kernel goes


def test_other_image_sizes():
    assert {w.window for w in attention(64)[:4]} == {(8, 8), (4, 4), (2, 2)}  # maps of 16, 8, 4 and 2 tokens per side


# --------------------------------------------------------------------------- measuring


class Fake:
    """A workload whose result is right but for 2 warps, that cannot run 8, and remembers the tiles it ran with."""

    dtype = "fp32"

    def prepare(self, kernel, batch, device):
        def run():
            self.ran = tile_table.nearest(kernel, "hopper", **dict(FEATURES))
            if self.ran["num_warps"] == 8:
                raise type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
            if self.ran["num_stages"] == 4:
                raise KeyError("a mistake")
            result = torch.empty(4) if self.ran["num_stages"] == 3 else torch.arange(4.0)
            return [result + 0.1 * (self.ran["num_warps"] == 2)]

        return run


def timer_of(*workloads):
    def timer(runs):
        found = []
        for run in runs:
            run()
            found.append(seconds(workloads[0].ran))
        return found

    return timer


def test_candidates_are_checked():
    fake = Fake()
    task = Task("tiled", FEATURES, (fake,))
    measure = Comparison(task, START, 1, torch.device("cpu"), timer_of(fake))
    assert measure(START, START | {"block_m": 128}) == pytest.approx(seconds(START | {"block_m": 128}) / seconds(START))
    assert measure(START, START | {"num_warps": 2}) is None  # another result
    assert measure(START, START | {"num_stages": 3}) is None  # memory that nobody wrote
    assert measure(START, START | {"num_warps": 8}) is None  # does not fit
    with pytest.raises(KeyError):
        measure(START, START | {"num_stages": 4})
    assert not torch.are_deterministic_algorithms_enabled()


# --------------------------------------------------------------------------- the table and resuming


def tasks(*tokens: int) -> list[Task]:
    return [Task("tiled", (("bits", 32), ("tokens", n), ("block_d", 16)), (Fake(),)) for n in tokens]


def tune_with(todo: list[Task], table: UserTable, **options):
    """With the times of `seconds`, whichever of the workloads ran."""

    def timer(runs):
        found = []
        for run in runs:
            run()
            found.append(next(seconds(w.ran) for task in todo for w in task.workloads if hasattr(w, "ran")))
        return found

    return tune(todo, table, torch.device("cpu"), 1, progress=False, timer=options.pop("timer", timer), **options)


def test_tune_writes_rows_that_lookups_find(folder, monkeypatch):
    monkeypatch.setattr(tuning, "use_backend", lambda name: pytest.MonkeyPatch.context())
    table = UserTable.of("My GPU")
    assert table.path == folder / "my-gpu.json"
    todo = tasks(784)
    found = tune_with(todo, table)
    best = found[todo[0]]
    assert best.speed > 1.0 and best.refused > 0
    row = json.loads(table.path.read_text())["kernels"]["tiled"][0]
    assert row == dict(todo[0].features) | best.tiles | {"tuned": row["tuned"]}
    assert row["tuned"]["speed"] == pytest.approx(best.speed, abs=1e-3)
    assert tile_table.nearest("tiled", "hopper/My GPU", bits=32, tokens=784, block_d=16) == best.tiles
    assert tune_with(todo, table) == {}
    assert set(tune_with(todo, table, again=True)) == set(todo)
    assert len(table.read()["tiled"]) == 1


def test_killed_and_resumed(folder, monkeypatch):
    monkeypatch.setattr(tuning, "use_backend", lambda name: pytest.MonkeyPatch.context())
    table, todo = UserTable.of("My GPU"), tasks(49, 196, 784)
    put = UserTable.put
    monkeypatch.setattr(
        UserTable, "put", lambda self, task, found: (_ for _ in ()).throw(KeyboardInterrupt) if task == todo[1]
        else put(self, task, found),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        tune_with(todo, table)
    assert [row["tokens"] for row in table.read()["tiled"]] == [49]
    monkeypatch.undo()
    monkeypatch.setenv("ASVIT_FAST_TILES", str(folder))
    monkeypatch.setattr(tuning, "use_backend", lambda name: pytest.MonkeyPatch.context())
    assert list(tune_with(todo, table)) == todo[1:]
    assert [row["tokens"] for row in table.read()["tiled"]] == [49, 196, 784]
    monkeypatch.setattr(tuning, "_triton_version", lambda: "another")
    assert list(tune_with(todo, table)) == todo


def test_a_bad_table_is_an_input_error(folder):
    table = UserTable.of("My GPU")
    table.path.write_text("{")
    with pytest.raises(InputError, match=r"my-gpu\.json"):
        table.has(tasks(49)[0])
    assert table.path.read_text() == "{"


INTERPRETED = """
import json, sys
import torch
from asvit_fast.bench import tuning
from asvit_fast.bench.tuning import UserTable, tasks_of, tune
from asvit_fast.bench.workloads import AttentionWorkload, EmbedWorkload, MergeWorkload

workloads = {
    "window_attention": AttentionWorkload((3, 3), 8, 1, 3, biased=True),
    "patch_embed": EmbedWorkload(3, 5, 9),
    "patch_merge": MergeWorkload(3, 4, 6, 5),
}
tuning.CHOICES = {f"block_{name}": (16, 32, 64) for name in "mnk"}  # the others mean nothing here
todo = tasks_of([workloads[sys.argv[1]]], sys.argv[2:])
ratios = iter([[1.0, 0.9]] * 3 + [[1.0, 1.1]] * 10000)
found = tune(todo, UserTable.of("interpreter"), torch.device("cpu"), 1, progress=False, timer=lambda runs: next(ratios))
print(json.dumps({str(task): [result.refused, result.tried] for task, result in found.items()}))
"""


@triton_versions.interpreter
@pytest.mark.parametrize(
    ("op", "dtypes", "rows"),
    [
        ("window_attention", ("bf16", "fp32"), 5),
        ("patch_embed", ("bf16",), 3),
        pytest.param("patch_merge", ("fp32",), 3, marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(op, dtypes, rows, folder, root):
    """Real kernels, forward and backward, with other tiles: every candidate that can run is right."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, op, *dtypes]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == len(tile_table.read_table(folder / "interpreter.json")) == rows
    assert {refused for refused, _ in found.values()} == {0}
    for task, (_, tried) in found.items():  # single tiles have no blocks to choose
        assert tried >= 2 or (task.startswith("single_tile") and tried == 0), task


# --------------------------------------------------------------------------- the command


def test_dry_run(capsys):
    assert main(["tune", "--dry-run", "--dtypes", "bf16,fp32"]) == 0
    shown = capsys.readouterr().out
    assert "single_tile bits=16 tokens=49 block_d=32" in shown
    assert "28x28x45 fp32" in shown
    assert "fp16" not in shown
    assert "minutes" in shown
    assert main(["tune", "--dry-run", "--shapes", "5x6x7,7x7x32b", "--dtypes", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "5x6x7 bf16" in shown and "7x7x32 bf16 biased" in shown and "784" not in shown
    assert main(["tune", "--dry-run", "--topology", "4,2,2|2,1,2|2,1,2|2,1,2|16", "--img-size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "8x8x16" in shown and "4x4 pixels to 32" in shown and "2x2x32 to 64" in shown
    assert main(["tune", "--dry-run", "--ops", "patch_merge"]) == 0
    shown = capsys.readouterr().out
    assert "patch_merge_products" in shown and "single_tile" not in shown and "patch_embed" not in shown


def test_without_a_gpu(capsys, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert main(["tune", "--device", "cpu"]) == 2
    assert "'cpu'" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "7x7", "7x7"),
        ("--shapes", "7x0x8", "7x0x8"),
        ("--dtypes", "fp64", "fp64"),
        ("--ops", "softmax", "softmax"),
        ("--topology", "1,2", "topology"),
        ("--shapes", "7x7x32 --ops patch_merge", "--ops"),
    ],
)
def test_bad_options(option, value, message, capsys):
    assert main(["tune", "--dry-run", option, *value.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu(folder):
    assert main(["tune", "--shapes", "7x7x32b", "--dtypes", "bf16", "--batch", "4", "--quiet"]) == 0
    table = UserTable.of(torch.cuda.get_device_name())
    assert set(table.read()) == {"single_tile", "single_tile_backward"}
    assert all(AttentionWorkload((7, 7), 32).tokens == row["tokens"] for rows in table.read().values() for row in rows)
