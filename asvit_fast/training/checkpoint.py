"""Checkpoints in timm's format, with everything that a training needs to go on to the same bits."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from ..errors import InputError
from ..files import file_errors

LAST, BEST = "last.pth.tar", "model_best.pth.tar"
STATE_KEY = "asvit_fast"  # the entry that timm does not have: position, random states
WEIGHTS = ("state_dict", "model")  # keys of weights: timm's; of other training codes
AVERAGES = ("state_dict_ema", "model_ema")
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
    """Undoes ``random_state``. Raises InputError for what is no such state."""
    try:
        torch.set_rng_state(state["torch"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        version, words, gauss_next = state["python"]
        random.setstate((version, tuple(words), gauss_next))
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint is damaged: its random states cannot be used ({one_line(error)})") from error


def seed_everything(seed: int, device: torch.device) -> None:
    """A start of its own for each seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a .pth.tar, .pth or .safetensors file holds, on the CPU; no code of the file is run.

    Raises:
        InputError: no such file, or one that is not such a file or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist; give a file of asvit-fast train or of timm")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # anything: pickle, zip and torch each have their own
        raise InputError(
            f"{str(path)!r} is not a checkpoint that can be loaded safely: it is damaged, or no checkpoint, or holds "
            "objects other than tensors, numbers and text"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds {type(content).__name__}, not a checkpoint; save a state_dict")
    return content


def last_epoch(content: Mapping[str, Any]) -> int:
    """The last finished epoch of a checkpoint, -1 where it says none. Raises InputError for what is no epoch."""
    epoch = content.get("epoch", -1)
    if type(epoch) is not int or epoch < -1:
        raise InputError(f"the checkpoint is damaged: epoch must be a whole number from 0, got {epoch!r}")
    return epoch


def weights_of(content: dict[str, Any], path: str | os.PathLike[str], use_ema: bool = False) -> dict[str, Any]:
    """The state_dict in what ``read_file`` gave, or its moving average. Raises InputError when there is none."""
    for key in AVERAGES if use_ema else WEIGHTS:
        if isinstance(content.get(key), Mapping):
            if not _are_weights(content[key]):
                raise InputError(f"{str(path)!r}: {key} must hold tensors by their names; give another checkpoint")
            return clean_state_dict(dict(content[key]))
    if use_ema:
        raise InputError(f"{str(path)!r} holds no moving average of the weights; leave out use_ema")
    if _are_weights(content):
        return clean_state_dict(content)
    raise InputError(f"{str(path)!r} holds no weights ({', '.join(map(str, list(content)[:5]))}); give a checkpoint")


def _are_weights(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and without torch's advice to load a file unsafely."""
    text = " ".join(str(error).split())
    if "weights_only" in text:
        return "it holds more than tensors, numbers and text"
    return text if len(text) <= 300 else text[:300] + " ..."


def link_or_copy(source: Path, target: Path) -> None:
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
        scratch.unlink(missing_ok=True)  # which stays where both were names of one file already
