"""``asvit-fast tune``: refine the tiles of Triton kernels for the GPU at hand."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import torch

from ..bench.tuning import LIMIT, SECONDS, Found, Task, UserTable, find_gpu, tasks_of, tune
from ..bench.workloads import Workload, default_workloads, topology_workloads, workload_of
from ..errors import InputError
from ..topology import Topology
from .common import print_on_main, table


def run(values: SimpleNamespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise InputError("tune needs Triton, which is not installed: pip install triton")
    tasks = tasks_of(workloads_of(values), values.dtypes)
    if values.dry_run:
        print(listing(tasks))
        return 0
    device = find_gpu(values.device)
    user_table = UserTable.of(torch.cuda.get_device_name(device))
    announce(values, tasks, user_table)
    found = tune(tasks, user_table, device, values.batch, values.again, progress=not values.quiet)
    conclude(values, found, user_table)
    return 0


def workloads_of(values: SimpleNamespace) -> list[Workload]:
    """Workloads of the shapes and topologies in the options, or the default ones."""
    if not values.topology and not values.shapes:
        return default_workloads(values.img_size, values.ops)
    if values.shapes and "window_attention" not in values.ops:
        raise InputError("--shapes are windows: --ops must have window_attention")
    found: list[Workload] = [workload_of("window_attention", shape) for shape in values.shapes]
    for topology in values.topology:
        found += topology_workloads(Topology.parse(topology), values.img_size, values.ops)
    return found


def listing(tasks: list[Task]) -> str:
    rows = [("row of the table", "timed on")]
    rows += [(str(task), ", ".join(map(str, task.workloads))) for task in tasks]
    return f"{table(rows)}\n{estimate(tasks)}"


def estimate(tasks: list[Task]) -> str:
    minutes = sum(len(task.workloads) for task in tasks) * SECONDS / 60
    return (
        f"{len(tasks)} rows, at most {LIMIT} candidates each: about {max(1, round(minutes))} minutes, mostly compiling"
    )


def announce(values: SimpleNamespace, tasks: list[Task], user_table: UserTable) -> None:
    done = 0 if values.again else sum(user_table.has(task) for task in tasks)
    going_on = f"{user_table.path} has {done} of them: continuing from there."
    beginning = f"Writing to {user_table.path}; stop at any time, the same command continues."
    print_on_main(
        f"Tuning {', '.join(values.ops)} for {user_table.gpu} in {', '.join(values.dtypes)}.\n{estimate(tasks)}.\n"
        f"{going_on if done else beginning}",
        values.quiet,
    )


def conclude(values: SimpleNamespace, found: dict[Task, Found], user_table: UserTable) -> None:
    rows = [("row", "tiles", "speed", "tried", "refused")]
    for task, result in found.items():
        tiles = " ".join(f"{name}={value}" for name, value in result.tiles.items())
        rows.append((str(task), tiles, f"{result.speed:.2f}x", str(result.tried), str(result.refused)))
    if found:
        print_on_main(table(rows), values.quiet)
    print_on_main(f"From now on used by every model on {user_table.gpu}; delete the file to undo it:", values.quiet)
    print(user_table.path)
