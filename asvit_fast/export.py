"""A topology as a folder that ``timm.create_model("local-dir:...")`` loads."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf

from . import models  # noqa: F401  registers "asvit" with timm
from .errors import InputError
from .report.runs import find_runs
from .topology import Topology

FILES = ("model.safetensors", "config.json")  # the configuration last: a folder with one is complete
SCRATCH = ".export-"  # prefix of the folder that the files are made in


def export(
    directory_or_topology: str | Path | Topology,
    to: str | Path,
    seed: int = 0,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] = 224,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``to`` and return its path.

    ``directory_or_topology`` is a run directory (its final topology; of a search and a scaling run side by side, the
    scaled one), a topology or its string. The weights are freshly initialised from ``seed``, float32, not trained.
    ``img_size`` is a side, or height and width, in pixels; ``num_classes`` 0 leaves the classifier out.

    After ``import asvit_fast``, ``timm.create_model(f"local-dir:{to}", pretrained=True)`` gives the same network.
    Raises InputError when there is no finished run or valid topology, or when ``to`` holds anything but an earlier
    export, which is replaced; OSError when writing fails, and then an earlier export is still whole.
    """
    topology = final_topology(directory_or_topology)
    target = Path(to)
    _check_target(target)
    arguments = {"topology": str(topology), "img_size": img_size if isinstance(img_size, int) else list(img_size)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            "asvit", topology=str(topology), img_size=img_size, num_classes=num_classes, pretrained=False
        )
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=target) as folder:
        try:
            save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
        except SafetensorError as error:  # a full disk, among others
            raise InputError(
                f"cannot write {str(target / FILES[0])!r}: {error}; free space or choose another folder"
            ) from None
        for name in FILES:
            os.replace(Path(folder) / name, target / name)
    return target


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
