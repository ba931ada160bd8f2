"""Triton kernel of the square's Taylor rule: rows (x, x', x'') in, rows of y = x^2 out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
# fusing multiplications and additions is wanted, and said: Triton's default changes between versions
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def square_taylor_kernel(
    input_pointer,  # [ORDERS + 1, count]
    output_pointer,  # [ORDERS + 1, count]
    count,
    ORDERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program maps BLOCK columns of all rows."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < count
    count = tl.cast(count, tl.int64)
    stored: tl.constexpr = output_pointer.dtype.element_ty
    x = tl.load(input_pointer + columns, mask=mask, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    tl.store(output_pointer + columns, (x * x).to(stored), mask=mask)
    if ORDERS >= 1:
        x1 = tl.load(input_pointer + count + columns, mask=mask, other=0.0).to(x.dtype)
        tl.store(output_pointer + count + columns, (2.0 * x * x1).to(stored), mask=mask)
        if ORDERS >= 2:
            x2 = tl.load(input_pointer + 2 * count + columns, mask=mask, other=0.0).to(x.dtype)
            tl.store(output_pointer + 2 * count + columns, (2.0 * (x * x2 + x1 * x1)).to(stored), mask=mask)


def square_taylor(x: torch.Tensor) -> torch.Tensor:
    """The square's Taylor rule on a GPU: x [orders + 1, ...] of any floating dtype; the result is contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)  # [orders + 1, ...]
    if x.numel() == 0:
        return y
    count = x[0].numel()
    grid = (triton.cdiv(count, BLOCK),)
    with torch.cuda.device_of(x):
        square_taylor_kernel[grid](x, y, count, ORDERS=x.shape[0] - 1, BLOCK=BLOCK, **OPTIONS)
    return y
