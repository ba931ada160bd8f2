"""Triton kernel of GELU's Taylor rule: rows (x, x', x'') in, rows of y = GELU(x) out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import device_guard

BLOCK = 1024
# fusing multiplications and additions is wanted, and said: Triton's default changes between versions
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _normal_gate(x):
    # P, P', P'' of the normal distribution
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)), density, -x * density


@triton.jit
def _logistic_gate(x):
    # P, P', P'' of the logistic function of u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    SLOPE: tl.constexpr = 1.5957691216057308
    CUBIC: tl.constexpr = 0.044715
    u = SLOPE * x * (1.0 + CUBIC * x * x)
    u1 = SLOPE * (1.0 + 3.0 * CUBIC * x * x)
    u2 = 6.0 * SLOPE * CUBIC * x
    e = tl.exp(-tl.abs(u))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    product = small * inverse
    balance = tl.where(u < 0.0, inverse - small, small - inverse)
    return tl.where(u < 0.0, small, inverse), product * u1, product * (balance * u1 * u1 + u2)


@triton.jit
def gelu_taylor_kernel(
    input_pointer,  # [ORDERS + 1, count]
    output_pointer,  # [ORDERS + 1, count]
    bias_pointer,  # [channels], added to the value; read only if HAS_BIAS
    count, channels,
    ORDERS: tl.constexpr, TANH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program maps BLOCK columns of all rows."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < count
    count = tl.cast(count, tl.int64)
    x = tl.load(input_pointer + columns, mask=mask, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    if HAS_BIAS:
        # columns % channels by one 64-bit division for the block: a GPU has none, and the call that it takes is slow
        channels = tl.cast(channels, tl.int64)
        step = tl.cast(tl.minimum(channels, BLOCK), tl.int32)
        channel = tl.program_id(0).to(tl.int64) * BLOCK % channels + tl.arange(0, BLOCK) % step
        channel = tl.where(channel < channels, channel, channel - channels)
        x += tl.load(bias_pointer + channel, mask=mask, other=0.0).to(x.dtype)
    # beyond +-40 the derivatives of P are 0; NaN fails both comparisons and stays
    z = tl.where(x < -40.0, -40.0, tl.where(x > 40.0, 40.0, x))
    if TANH:
        p, p1, p2 = _logistic_gate(z)
    else:
        p, p1, p2 = _normal_gate(z)
    stored: tl.constexpr = output_pointer.dtype.element_ty
    tl.store(output_pointer + columns, (x * p).to(stored), mask=mask)
    if ORDERS >= 1:
        first = p + z * p1
        x1 = tl.load(input_pointer + count + columns, mask=mask, other=0.0).to(x.dtype)
        tl.store(output_pointer + count + columns, (first * x1).to(stored), mask=mask)
        if ORDERS >= 2:
            second = 2.0 * p1 + z * p2
            x2 = tl.load(input_pointer + 2 * count + columns, mask=mask, other=0.0).to(x.dtype)
            y2 = first * x2 + second * (x1 * x1)
            tl.store(output_pointer + 2 * count + columns, y2.to(stored), mask=mask)


def gelu_taylor(x: torch.Tensor, approximate: str = "none", bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU's Taylor rule on a GPU: x [orders + 1, ..., C] of any floating dtype, bias [C] added to the value before it;
    the result is contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)  # [orders + 1, ...]
    if x.numel() == 0:
        return y
    count = x.numel() // x.shape[0]
    with device_guard(x):
        gelu_taylor_kernel[(-(-count // BLOCK),)](
            x,
            y,
            x if bias is None else bias.contiguous(),
            count,
            1 if bias is None else bias.shape[0],
            ORDERS=x.shape[0] - 1,
            TANH=approximate == "tanh",
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return y
