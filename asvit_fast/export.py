"""A topology or a trained network as a folder that ``timm.create_model("local-dir:...")`` loads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from . import models  # noqa: F401  registers "asvit" with timm
from .errors import InputError
from .files import replace_file
from .report.runs import find_runs
from .topology import Topology
from .training.checkpoint import BEST, LAST
from .training.checkpoint_model import build_from_checkpoint
from .training.network import takes_size

FILES = ("model.safetensors", "config.json")  # the configuration last: a folder with one is complete
SCRATCH = ".export-"  # prefix of the folder that the files are made in


def export(
    directory_or_topology: str | Path | Topology,
    to: str | Path,
    seed: int = 0,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] = 224,
    use_ema: bool = False,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``to`` and return its path.

    ``directory_or_topology`` is a run directory (its final topology; of a search and a scaling run side by side, the
    scaled one), a topology or its string. The weights are freshly initialised from ``seed``, float32, not trained.
    ``img_size`` is a side, or height and width, in pixels; ``num_classes`` 0 leaves the classifier out.

    Of a training (its run directory, or a checkpoint of it) the trained weights are written, with ``use_ema`` their
    moving average; classes and size are then those of the training.

    After ``import asvit_fast``, ``timm.create_model(f"local-dir:{to}", pretrained=True)`` gives the same network.
    Raises InputError when there is no finished run or valid topology, or when ``to`` holds anything but an earlier
    export, which is replaced; OSError when writing fails, and then an earlier export is still whole.
    """
    target = Path(to)
    if is_trained(directory_or_topology):
        model, arguments = _trained(Path(str(directory_or_topology)), use_ema)
    else:
        model, arguments = _fresh(final_topology(directory_or_topology), seed, num_classes, img_size)
    _check_target(target)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=target) as folder:
        try:
            save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
        except SafetensorError as error:  # a full disk, among others
            raise InputError(
                f"cannot write {str(target / FILES[0])!r}: {error}; free space or choose another folder"
            ) from None
        for name in FILES:
            replace_file(Path(folder) / name, target / name)
    return target


def is_trained(source: str | Path | Topology) -> bool:
    """Whether there are trained weights: the run directory of a training, or a checkpoint."""
    path = Path(str(source))
    return path.is_file() or any((path / name).is_file() for name in (BEST, LAST))


def _trained(path: Path, use_ema: bool) -> tuple[nn.Module, dict[str, Any]]:
    built = build_from_checkpoint(path, use_ema=use_ema)
    given = {**(built.arguments.get("model_kwargs") or {}), "img_size": built.arguments.get("img_size")}
    return built.model, {name: value for name, value in given.items() if name != "img_size" or takes_size(built.name)}


def _fresh(
    topology: Topology, seed: int, num_classes: int, img_size: int | tuple[int, int]
) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            "asvit", topology=str(topology), img_size=img_size, num_classes=num_classes, pretrained=False
        )
    return model, {"topology": str(topology), "img_size": img_size if isinstance(img_size, int) else list(img_size)}


def final_topology(directory_or_topology: str | Path | Topology) -> Topology:
    """The topology a finished run ended with, or the one given. Raises InputError."""
    if isinstance(directory_or_topology, Topology):
        return directory_or_topology
    if "|" in str(directory_or_topology):
        return Topology.parse(str(directory_or_topology))
    directory = Path(directory_or_topology)
    if not directory.is_dir():
        raise InputError(f"{str(directory)!r} is neither a topology string nor a run directory; give one of these")
    run = find_runs(directory)[-1]
    if run.result is None:
        raise InputError(
            f"the {run.kind} in {str(run.directory)!r} is not finished ({len(run.trace)} steps); "
            f"continue it, or give its topology so far: '{run.topology}'"
        )
    return Topology.parse(run.topology)


def _check_target(target: Path) -> None:
    """Refuse to put files among somebody else's."""
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot export to {str(target)!r}: it is a file; give a new or empty folder")
    if not target.is_dir() or all(item.name.startswith(SCRATCH) for item in target.iterdir()):
        return  # new, empty, or left behind by an export that was killed
    try:
        architecture = json.loads((target / "config.json").read_bytes()).get("architecture")
    except (OSError, ValueError, AttributeError):  # no configuration, or not one of a model
        architecture = None
    if architecture != "asvit":
        raise InputError(f"cannot export to {str(target)!r}: it holds other files; give a new or empty folder")
