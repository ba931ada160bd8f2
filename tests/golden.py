"""Golden numbers of the authors' network (VITA-Group/AsViT, float64) and the plain-numpy recipe of their inputs.

tests/data/s1..s4.npz hold the numbers, `meta` the names and shapes of the weights that the recipe draws.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import asvit_fast as af

DATA = Path(__file__).parent / "data"
CASES = ("s1", "s2", "s3", "s4")


def _weight(seed: int, index: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng([seed, index]).standard_normal(shape)
    if name.endswith("absolute_pos_embed"):
        return 0.2 * noise
    if len(shape) >= 2:
        return noise / math.sqrt(math.prod(shape[1:]))
    return 1.0 + 0.1 * noise if name.endswith("weight") else 0.05 * noise


class Golden:
    """One case: its arrays (``golden["ln.r1.v"]``), images, circle, and our network with the same weights."""

    def __init__(self, case: str) -> None:
        self.arrays = np.load(DATA / f"{case}.npz")
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        self.seed, self.side = self.meta["seed"], self.meta["side"]
        self.state_dict = {
            name: torch.from_numpy(_weight(self.seed, i, name, tuple(shape)))
            for i, (name, shape) in enumerate(self.meta["state_dict"])
        }

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def images(self, dtype: torch.dtype = torch.float64) -> Tensor:  # [8, 3, side, side]
        shape = (8, 3, self.side, self.side)
        return torch.from_numpy(np.random.default_rng([self.seed, 10000]).standard_normal(shape)).to(dtype)

    def circle(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:  # two times [3, side, side]
        matrix = np.random.default_rng([self.seed, 20000]).standard_normal((3 * self.side**2, 2))
        q, r = np.linalg.qr(matrix)
        q = q * np.sign(np.diag(r))
        u0, u1 = (torch.from_numpy(q[:, i].copy()).reshape(3, self.side, self.side).to(dtype) for i in range(2))
        return u0, u1

    def model(self, norm: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        """``norm``: "ln" or "id", as the files name them."""
        name = {"ln": "layer", "id": "identity"}[norm]
        model = af.create_model(
            self.meta["arch"],
            img_size=self.side,
            num_classes=self.meta["classes"],
            pos_embed="absolute" if self.meta["ape"] else "none",
            norm=name,
            dtype=torch.float64,
        )
        model.load_state_dict(af.convert_asvit_state_dict(self.state_dict))
        return model.to(dtype).eval()

    def scale(self, radius: str) -> float:
        """Circle radius: "r1" or "rN" (sqrt of the number of pixel values)."""
        return 1.0 if radius == "r1" else math.sqrt(3) * self.side


@cache
def golden(case: str) -> Golden:
    return Golden(case)


def relative_error(got: Any, want: Any) -> float:
    """Largest difference over the largest magnitude."""
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    return float((got - want).abs().max() / want.abs().max())
