"""Checkpoints in timm's format, with everything that a training needs to go on to the same bits."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..files import file_errors

LAST, BEST = "last.pth.tar", "model_best.pth.tar"
OURS = "asvit_fast"  # the entry that timm does not have: position, random states
FORMAT = 2  # timm's: "epoch" is the last finished one


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that this process draws from."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  timm's Mixup draws from it
    version, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undoes ``random_state``."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int, device: torch.device) -> None:
    """A start of its own for each seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of ours or of timm's train.py, on the CPU.

    Raises:
        InputError: no such file, not a checkpoint, or one that would run code when loaded.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist; give a .pth.tar of asvit-fast train or timm")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options in one
            content = torch.load(path, map_location="cpu", weights_only=True)
        content["state_dict"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{str(path)!r} is not a checkpoint ({reason}); give a .pth.tar of asvit-fast train or timm"
        ) from error
    return content


def keep_as(source: Path, target: Path) -> None:
    """Another name for a file that will be replaced, never changed: no copy where the system has hard links."""
    scratch = target.with_name(f".{target.name}.tmp")
    with file_errors("write", target):
        scratch.unlink(missing_ok=True)
        try:
            os.link(source, scratch)
        except OSError:  # a file system without links
            with contextlib.ExitStack() as cleanup:
                cleanup.callback(scratch.unlink, missing_ok=True)
                shutil.copyfile(source, scratch)
                cleanup.pop_all()
        os.replace(scratch, target)
