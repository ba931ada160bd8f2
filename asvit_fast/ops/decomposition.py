"""Decompositions of our custom ops: what they are in torch's own operations.

`torch.export` keeps a custom op as it is, so that an exported program runs the same kernels. Who knows torch's
operations only replaces it by its decomposition: `torch.onnx.export(model, args, dynamo=True)` does so by itself, for
modules and exported programs, our networks and accelerated ones, and `ExportedProgram.run_decompositions` with
`torch._decomp.decomposition_table`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef


def register_decomposition(op: CustomOpDef, function: Callable[..., Any]) -> None:
    """`function` takes and returns the same as `op` [tensors of the same shapes, dtypes and, contiguous, strides], and
    is made of operations that torch decomposes further."""
    overload = op._opoverload
    torch._decomp.decomposition_table[overload] = function
    # Of an op without a meta function, fake tensors of unknown size would run the decomposition, whose branches on
    # sizes are guards; the op's own fake has none.
    torch._decomp.meta_table[overload] = function
