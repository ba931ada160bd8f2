"""patch_embed against loops written from its definition, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from asvit_fast import ops
from asvit_fast.nn.patch_embed import embed_patches


@pytest.mark.parametrize("kernel", [4, 5, 8])
@pytest.mark.parametrize(("stride", "dilation"), [(4, 1), (8, 2), (16, 5)])
@pytest.mark.parametrize("size", [(32, 32), (35, 50)])
def test_patch_embed(kernel: int, stride: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(6, 3, kernel, kernel, dtype=torch.float64)
    bias, gain, offset = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    out = embed_patches(image, weight, bias, stride, dilation, gain, offset, 1e-5)
    rows, columns = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
    assert out.shape == (2, rows, columns, 6)
    before = max(dilation * (kernel - 1) + 1 - stride, 0) // 2
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 0)):
        value = bias.expand(2, 6).clone()
        for ky in range(kernel):
            for kx in range(kernel):
                y, x = row * stride - before + ky * dilation, column * stride - before + kx * dilation
                if 0 <= y < size[0] and 0 <= x < size[1]:
                    value += image[:, :, y, x] @ weight[:, :, ky, kx].T
        torch.testing.assert_close(out[:, row, column], F.layer_norm(value, (6,), gain, offset), rtol=1e-10, atol=1e-11)


def test_patch_embed_rejects_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="same Cin"):
        ops.patch_embed(torch.zeros(1, 4, 8, 8), torch.zeros(2, 3, 4, 4), None, 4, 1, (0, 0, 0, 0))
