"""Tile choices are data: tiles.json has a table per GPU family and kernel, looked up by the nearest shape. Nothing is
tuned while a model runs."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
import triton


@functools.cache
def _tables() -> dict[str, dict[str, list[dict[str, int]]]]:
    return json.loads(Path(__file__).with_name("tiles.json").read_text())


def block(size: int) -> int:
    """The tile that holds `size`: a power of two, and at least what tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def family_of(device: torch.device) -> str:
    """Whose table a device uses: "90" for Hopper, "100" for datacenter Blackwell, else "80", whose tensor core
    instructions all others have; the interpreter's is Hopper."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: "90", 10: "100"}.get(major, "80")


@functools.cache
def choose(kernel: str, family: str, tokens: int, head_dim: int, bits: int) -> dict[str, Any]:
    """BLOCK_M queries, BLOCK_N keys, num_warps and num_stages of the nearest shape with elements of `bits`."""

    def distance(row: dict[str, int]) -> float:
        return abs(math.log2(row["tokens"] / tokens)) + 4 * abs(math.log2(row["block_d"] / block(head_dim)))

    row = min((row for row in _tables()[family][kernel] if row["bits"] == bits), key=distance)
    options = {name: row[name] for name in ("num_warps", "num_stages")}
    if "block_m" in row:
        block_m, block_n = row["block_m"], row["block_n"]
        options |= {"BLOCK_M": block_m, "TAIL_M": block(tokens % block_m)}
        options |= {"BLOCK_N": block_n, "TAIL_N": block(tokens % block_n)}
    # fusing multiplications and additions is wanted, and said: Triton's default changes between versions
    return options | {"enable_fp_fusion": True}
