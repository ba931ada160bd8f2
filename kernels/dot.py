"""Matrix products of tiles."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl

# Channels that a product of 32-bit elements sums over, at least; of 16-bit elements they are 16 in all versions.
LEAST_CHANNELS = 8 if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8) else 16


# Constants stand inside of functions or as defaults: Triton compares global ones in every launch, which takes time.
@triton.jit
def dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr = triton.knobs.runtime.interpret):
    """a [M, K] @ b [K, N] -> float32. The interpreter's product knows neither bfloat16 nor sums of it."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def round_to_tf32(x, INTERPRETED: tl.constexpr = triton.knobs.runtime.interpret):
    """x to the nearest number with ten bits behind the leading one, ties away from zero: tensor cores cut off the other
    bits, which would double the error."""
    if INTERPRETED:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


def precision(dtype: torch.dtype, operation: Literal["matmul", "conv"] = "matmul") -> str:
    """How float32 is multiplied, as torch's switches say for its own matrix products or convolutions: in one TF32
    product where they allow TF32 (of convolutions by default), else in three, which have the accuracy of float32.

    Only the settings named fp32_precision are read: they know what the older ones (allow_tf32,
    set_float32_matmul_precision) were set to, while reading the older ones raises where the newer ones were set.
    """
    if dtype != torch.float32:
        return "tf32x3"  # means nothing, but must not compile another kernel
    cudnn: Any = torch.backends.cudnn  # whose annotations leave out `conv`
    switch = cudnn.conv if operation == "conv" else torch.backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "tf32x3"
