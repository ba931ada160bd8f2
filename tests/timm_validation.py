"""timm's validation of a network: its validate.py where there is a checkout, else the same steps of its functions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn

from asvit_fast.training.evaluate import Evaluation

ROOT = Path(__file__).parent.parent
CHECKOUT = os.environ.get("ASVIT_FAST_TIMM")


def replayed(model: nn.Module, images: Path, prefetcher: bool = True, /, **arguments: Any) -> Evaluation:
    """Through timm's public functions, in the steps of its validate.py."""
    config = resolve_data_config(arguments, model=model, use_test_size=True)
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    loader = create_loader(
        create_dataset("", root=str(images), split="validation", input_img_mode=mode),
        input_size=config["input_size"],
        batch_size=5,
        use_prefetcher=prefetcher,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    meters = [AverageMeter() for _ in range(3)]
    model.eval()
    with torch.inference_mode():
        for pixels, targets in loader:
            logits = model(pixels)
            found = (*accuracy(logits, targets, topk=(1, 5)), F.cross_entropy(logits, targets))
            for meter, value in zip(meters, found, strict=True):
                meter.update(value.item(), len(targets))
    return Evaluation(len(loader.dataset), *(meter.avg for meter in meters))


def validate_py(images: Path, *options: str) -> tuple[float, float, str]:
    """The output of timm's own program: top-1 and top-5, and the loss to four digits."""
    program = [sys.executable, "-m", "asvit_fast.timm", f"{CHECKOUT}/validate.py", str(images), *options]
    fixed = ("-j", "0", "--device", "cpu", "--batch-size", "5", "--log-freq", "1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*program, *fixed], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--result" in done.stdout, done.stderr
    result = json.loads(done.stdout.partition("--result")[2])
    losses = re.findall(r"Loss:\s+\S+ \(\s*([\d.]+)\)", done.stdout + done.stderr)
    return result["top1"], result["top5"], losses[-1]
