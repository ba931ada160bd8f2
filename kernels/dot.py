"""Matrix products of tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Channels that a product of 32-bit elements sums over, at least; of 16-bit elements they are 16 in all versions.
LEAST_CHANNELS = 8 if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8) else 16


# Constants stand inside of functions or as defaults: Triton compares global ones in every launch, which takes time.
@triton.jit
def dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr = triton.knobs.runtime.interpret):
    """a [M, K] @ b [K, N] -> float32. The interpreter's product does not know bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: three TF32 products have its accuracy; one, if torch's own matmul may use TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
