"""Decompositions of our custom ops: what they are in torch's own operations.

`torch.export` keeps a custom op as it is, so that an exported program runs the same kernels. Who knows torch's
operations only replaces it by its decomposition: `torch.onnx.export(model, args, dynamo=True)` does so by itself, for
modules and exported programs, our networks and accelerated ones, and `ExportedProgram.run_decompositions` with
`torch._decomp.decomposition_table`. `torch.compile` keeps the op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload
from torch.library import CustomOpDef


def register_decomposition(op: CustomOpDef, function: Callable[..., Any]) -> None:
    """`function` takes and returns the same as `op` [tensors of the same shapes, dtypes and, contiguous, strides], and
    is made of operations that torch decomposes further. `op` has its fake function already."""
    overload = op._opoverload
    torch._decomp.decomposition_table[overload] = function
    # Of an op without a meta function, fake tensors of unknown size would run the decomposition, whose branches on
    # sizes are guards; the op's own fake has none.
    torch._decomp.meta_table[overload] = function
    fake = op._abstract_fn
    assert fake is not None

    def fake_while_tracing(*args: Any, **kwargs: Any) -> Any:
        _keep_in_inductor(overload)
        return fake(*args, **kwargs)

    op.register_fake(fake_while_tracing)


def _keep_in_inductor(overload: OpOverload) -> None:
    """Tell Inductor to call the op: with CI in the environment it refuses to where there is a decomposition.

    Called whenever the op is traced: Inductor is imported by then, which takes seconds, and has not lowered it yet.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and overload not in lowering.lowerings:
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(overload))
        lowering.make_fallback(overload, layout_constraint=constraint, warn=False)
