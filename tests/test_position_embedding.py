"""nn/position_embedding.py: the numbers of timm, with a gradient that is the same each time on a GPU."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed_nhwc
from torch import Tensor, nn

from asvit_fast.nn.position_embedding import resample_by_products, resample_position_embedding

SIZES = [((7, 5), (7, 5)), ((8, 8), (4, 4)), ((14, 9), (5, 20)), ((3, 4), (1, 2)), ((3, 4), (1, 1))]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_timm(device: torch.device, old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype) -> None:
    embedding = torch.randn(1, *old, 6, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(1, *new, 6, device=device, dtype=dtype)
    found = resample_by_products(embedding, *new)
    expected = resample_abs_pos_embed_nhwc(embedding, list(new))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(resample_position_embedding(embedding, new), expected)
    ours, theirs = (torch.autograd.grad(x, embedding, gradient)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.autocast(device.type, torch.bfloat16):
        again = resample_by_products(embedding, *new)
        assert torch.equal(again, found)
        assert torch.equal(torch.autograd.grad(again, embedding, gradient)[0], ours)


def test_transforms() -> None:
    embedding, direction = torch.randn(2, 1, 6, 5, 3)
    expected = resample_abs_pos_embed_nhwc(direction, [3, 4])

    def resample(x: Tensor) -> Tensor:
        return resample_by_products(x, 3, 4)

    torch.testing.assert_close(torch.func.jvp(resample, (embedding,), (direction,))[1], expected)
    several = torch.stack([embedding, direction])
    torch.testing.assert_close(torch.vmap(resample)(several)[1], expected)
    compiled = torch.compile(resample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(direction), expected)


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1, 4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + resample_position_embedding(self.embedding, (x.shape[1], x.shape[2]))


def test_exported_for_any_size() -> None:
    model = Positioned()
    side = torch.export.Dim("side", min=2, max=64)
    program = torch.export.export(model, (torch.randn(1, 6, 6, 3),), dynamic_shapes=({1: side, 2: side},))
    for size in (4, 6, 9):
        x = torch.randn(1, size, size, 3)
        torch.testing.assert_close(program.module()(x), model(x))


def test_scripted() -> None:
    model = Positioned()
    scripted = torch.jit.script(model)
    for size in (4, 6):
        x = torch.randn(1, size, size, 3)
        assert torch.equal(scripted(x), model(x))


@pytest.mark.gpu
def test_the_same_each_time() -> None:
    embedding = torch.randn(1, 56, 56, 96, device="cuda", requires_grad=True)
    gradient = torch.randn(1, 14, 14, 96, device="cuda")
    first, *others = (
        torch.autograd.grad(resample_position_embedding(embedding, (14, 14)), embedding, gradient)[0] for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)
