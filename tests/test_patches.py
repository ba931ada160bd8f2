"""patch_merge against loops written from its definition, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from asvit_fast import ops


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("size", [(4, 6), (7, 5), (1, 1)])
@pytest.mark.parametrize("norm", [True, False])
def test_patch_merge(kernel: int, size: tuple[int, int], norm: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    features = 3 * kernel * kernel
    weight = torch.randn(5, features, dtype=torch.float64)
    gain, offset = (torch.randn(features, dtype=torch.float64) if norm else None for _ in range(2))
    out = ops.patch_merge(x, weight, kernel, 2, gain, offset)
    rows, columns = math.ceil(size[0] / 2), math.ceil(size[1] / 2)
    assert out.shape == (2, rows, columns, 5)
    before = (kernel - 2) // 2
    for row in range(rows):
        for column in range(columns):
            patch = torch.zeros(
                2, 3, kernel, kernel, dtype=torch.float64
            )  # channel-major, as nn.Unfold orders features
            for ky in range(kernel):
                for kx in range(kernel):
                    i, j = 2 * row - before + ky, 2 * column - before + kx
                    if 0 <= i < size[0] and 0 <= j < size[1]:
                        patch[:, :, ky, kx] = x[:, i, j]
            value = patch.flatten(1)
            value = F.layer_norm(value, (features,), gain, offset) if norm else value
            torch.testing.assert_close(out[:, row, column], value @ weight.T, rtol=1e-11, atol=1e-12)


def test_patch_merge_rejects_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="patch_merge: x must be"):
        ops.patch_merge(torch.zeros(1, 4, 4, 3), torch.zeros(2, 11), 2, 2)
