"""``asvit-fast tune``: refine the tiles of Triton kernels for the GPU at hand."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .common import DEVICE, IMG_SIZE, QUIET, say, table
from .options import Command, Option, flag, integer, listed, text

if TYPE_CHECKING:
    from ..tuning import Found, Task, UserTable
    from ..workloads import Workload

OPS = ("window_attention", "patch_embed", "patch_merge")
DTYPES = ("bf16", "fp16", "fp32")


def run(values: SimpleNamespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise InputError("tune needs Triton, which is not installed: pip install triton")
    from ..tuning import UserTable, find_gpu, tasks_of, tune

    tasks = tasks_of(workloads_of(values), values.dtypes)
    if values.dry_run:
        print(listing(tasks))
        return 0
    device = find_gpu(values.device)
    user_table = UserTable.of(gpu_name(device))
    announce(values, tasks, user_table)
    found = tune(tasks, user_table, device, values.batch, values.again, progress=not values.quiet)
    conclude(values, found, user_table)
    return 0


def gpu_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def workloads_of(values: SimpleNamespace) -> list[Workload]:
    """Of the shapes and topologies given, or the default ones."""
    from ..topology import Topology
    from ..workloads import default_workloads, topology_workloads

    if not values.topology and not values.shapes:
        return default_workloads(values.img_size, values.ops)
    if values.shapes and "window_attention" not in values.ops:
        raise InputError("--shapes are windows: --ops must have window_attention")
    found = [shape_workload(shape) for shape in values.shapes]
    for topology in values.topology:
        found += topology_workloads(Topology.parse(topology), values.img_size, values.ops)
    return found


def shape_workload(shape: str) -> Workload:
    """``28x28x8`` or ``7x7x32b``."""
    from ..workloads import AttentionWorkload

    try:
        rows, columns, head_dim = (int(number) for number in shape.removesuffix("b").split("x"))
        if min(rows, columns, head_dim) < 1:
            raise ValueError
    except ValueError:
        raise InputError(f"--shapes: expected ROWSxCOLUMNSxHEAD_DIM such as 7x7x32, got {shape!r}") from None
    return AttentionWorkload((rows, columns), head_dim, biased=shape.endswith("b"))


def subset(known: tuple[str, ...]):
    """A reader: ``a,b`` out of ``known``."""

    def read(value: Any) -> tuple[str, ...]:
        names = listed(value)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise InputError(f"expected some of {', '.join(known)}; got {', '.join(unknown) or 'nothing'}")
        return names

    return read


def strings(value: Any) -> tuple[str, ...]:
    """What was given once or several times."""
    return tuple(text(item) for item in ([value] if isinstance(value, str) else value))


def listing(tasks: list[Task]) -> str:
    rows = [("row of the table", "timed on")]
    rows += [(str(task), ", ".join(map(str, task.workloads))) for task in tasks]
    return f"{table(rows)}\n{estimate(tasks)}"


def estimate(tasks: list[Task]) -> str:
    from ..tuning import LIMIT, SECONDS

    minutes = sum(len(task.workloads) for task in tasks) * SECONDS / 60
    return (
        f"{len(tasks)} rows, at most {LIMIT} candidates each: about {max(1, round(minutes))} minutes, mostly compiling"
    )


def announce(values: SimpleNamespace, tasks: list[Task], user_table: UserTable) -> None:
    say(f"Tuning {', '.join(values.ops)} for {user_table.gpu} in {', '.join(values.dtypes)}.", values.quiet)
    say(f"{estimate(tasks)}.", values.quiet)
    done = 0 if values.again else sum(user_table.has(task) for task in tasks)
    if done:
        say(f"{user_table.path} has {done} of them: continuing from there.", values.quiet)
    else:
        say(f"Writing to {user_table.path}; stop at any time, the same command continues.", values.quiet)


def conclude(values: SimpleNamespace, found: dict[Task, Found], user_table: UserTable) -> None:
    rows = [("row", "tiles", "speed", "tried", "refused")]
    for task, result in found.items():
        tiles = " ".join(f"{name}={value}" for name, value in result.tiles.items())
        rows.append((str(task), tiles, f"{result.speed:.2f}x", str(result.tried), str(result.refused)))
    if found:
        say(table(rows), values.quiet)
    say(f"From now on used by every model on {user_table.gpu}; delete the file to undo it:", values.quiet)
    print(user_table.path)


COMMAND = Command(
    name="tune",
    summary="Refine the tiles of Triton kernels for the GPU at hand; models never tune anything themselves.",
    options=(
        Option("ops", subset(OPS), OPS, f"ops whose kernels to tune: {', '.join(OPS)}", "NAMES"),
        Option(
            "topology",
            strings,
            (),
            "tune for the shapes of this topology (may be repeated), not for the paper's networks and Swin",
            "NAME",
            repeated=True,
        ),
        Option(
            "shapes",
            listed,
            (),
            "tune for these windows: ROWSxCOLUMNSxHEAD_DIM in tokens and channels, and a b if there is a bias",
            "NAMES",
        ),
        IMG_SIZE,
        Option("dtypes", subset(DTYPES), DTYPES, f"of the activations: {', '.join(DTYPES)}", "NAMES"),
        Option("batch", integer(1), 32, "number of images in each timed call", "N"),
        DEVICE,
        Option("again", flag, False, "tune what the table already has, too", flag=True),
        Option("dry_run", flag, False, "list what would be tuned, and stop; needs no GPU", flag=True),
        QUIET,
    ),
    run=run,
    epilog="example: asvit-fast tune --dtypes bf16 --topology '8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88'\n"
    "The table is in the user's cache folder, or in the folder that ASVIT_FAST_TILES names.",
    resumable=True,
)
