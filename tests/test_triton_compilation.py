"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, with the Triton that is installed: the oldest that is
supported in `make test-oldest`. Kernels and arguments are what ops start, forward and backward; no GPU is needed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import triton_versions

pytest.importorskip("triton")

from kernel_inspection import Launch
from triton_cases import launches_of

from asvit_fast import ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Float32 products go through TF32 instructions of their own; those of the 16-bit types are the same. Calls take turns:
# to compile every one for all six would take the time of most other tests; kernels have several calls.
TARGETS = (((80, "fp32"), (90, "bf16"), (100, "fp32")), ((80, "fp16"), (90, "fp32"), (100, "bf16")))


def _leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attention(dtype: torch.dtype, side: int, head_dim: int, layout: str, size: int = 0, shift: int = 0, extras=True):
    """Windows of side x side tokens, 2 heads; `extras`: bias, padding with values where there is any, AttnScale."""
    size, tokens, channels = size or 2 * side, side * side, 6 * head_dim
    qkv, bias, padding, scale = _leaves(dtype, (1, size, size, channels), (2, tokens, tokens), (channels,), (2,))
    padding = padding if layout in ("timm", "torchvision") else None
    operands = {"bias": bias, "padding": padding, "attn_scale": scale} if extras else {}
    ops.window_attention(qkv, 2, (side, side), (shift, shift), layout=layout, **operands).sum().backward()


def volume(
    dtype: torch.dtype, window: tuple[int, ...], head_dim: int, layout: str, shift: int = 0, margin: int = 0,
    separate: bool = False,
):  # fmt: skip
    """Windows that do not divide a map of as many axes, with everything that kernels may be asked for; with a `margin`
    there are as many keys more on all sides of a window."""
    keys, channels = tuple(side + 2 * margin for side in window), 2 * head_dim
    size = [2 * side if layout == "grid" else 2 * side - 1 for side in window]
    widths = (channels,) * 3 if separate else (3 * channels,)
    maps = _leaves(dtype, *((1, *size, width) for width in widths))
    tokens = math.prod(window), math.prod(keys)
    bias, padding, attn_scale, scale = _leaves(dtype, (2, *tokens), (3 * channels,), (2,), (2,))
    ops.window_attention(
        tuple(maps) if separate else maps[0], 2, window, tuple(min(shift, side - 1) for side in window), bias, scale,
        layout=layout, padding=padding if layout in ("timm", "torchvision") else None, attn_scale=attn_scale,
        kv_window=keys if margin else None,
    ).sum().backward()  # fmt: skip


def embed(dtype: torch.dtype, kernel: int, channels: int, dilation: int, norm: bool):
    image, weight, bias = _leaves(dtype, (1, 3, 40, 40), (channels, 3, kernel, kernel), (channels,))
    vectors = _leaves(dtype, (channels,), (channels,)) if norm else ()
    ops.patch_embed(image, weight, bias, 4, dilation, (2, 3, 2, 3), *vectors).sum().backward()


def merge(dtype: torch.dtype, kernel: int, channels: int, order: str):
    features = kernel * kernel * channels
    x, weight, *vectors = _leaves(dtype, (1, 9, 8, channels), (2 * channels, features), (features,), (features,))
    bias = torch.zeros(2 * channels, dtype=dtype, requires_grad=True)
    ops.patch_merge(x, weight, kernel, 2, *vectors, bias, order=order).sum().backward()


def gelu(dtype: torch.dtype, approximate: str, biased: bool):
    for orders in range(3):
        ops.gelu_taylor(
            torch.zeros(orders + 1, 4, 16, dtype=dtype), approximate, torch.zeros(16, dtype=dtype) if biased else None
        )


def square(dtype: torch.dtype):
    for orders in range(3):
        ops.square_taylor(torch.zeros(orders + 1, 4, 16, dtype=dtype))


def position_bias(dtype: torch.dtype):
    (table,) = _leaves(dtype, (169, 3))
    ops.position_bias(table, torch.zeros(49, 49, dtype=torch.int64)).sum().backward()


CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "attention 7 x 7, d 4, masked": functools.partial(attention, side=7, head_dim=4, layout="masked", size=9, shift=3),
    "attention 7 x 7, d 32, timm": functools.partial(attention, side=7, head_dim=32, layout="timm", size=9, shift=3),
    "attention 8 x 8, d 8, grid": functools.partial(attention, side=8, head_dim=8, layout="grid"),
    "attention 7 x 7, d 16, plain": functools.partial(attention, side=7, head_dim=16, layout="masked", extras=False),
    "attention 14 x 14, d 22, torchvision": functools.partial(
        attention, side=14, head_dim=22, layout="torchvision", size=20, shift=7
    ),
    "attention 12 x 12, d 4, plain": functools.partial(attention, side=12, head_dim=4, layout="masked", extras=False),
    "attention 12 x 12, d 40, masked": functools.partial(attention, side=12, head_dim=40, layout="masked"),
    "attention 28 x 28, d 45, masked": functools.partial(attention, side=28, head_dim=45, layout="masked", size=30),
    "attention 10 x 10, d 70, grid": functools.partial(attention, side=10, head_dim=70, layout="grid"),
    "volume 7 x 7 x 7, d 16, torchvision": functools.partial(
        volume, window=(7, 7, 7), head_dim=16, layout="torchvision", shift=3
    ),
    "volume 8 x 7 x 7, d 32, masked, three maps": functools.partial(
        volume, window=(8, 7, 7), head_dim=32, layout="masked", shift=3, separate=True
    ),
    "volume 2 x 7 x 7, d 32, timm": functools.partial(volume, window=(2, 7, 7), head_dim=32, layout="timm", shift=3),
    "volume 4 x 4 x 4, d 8, masked": functools.partial(
        volume, window=(4, 4, 4), head_dim=8, layout="masked", shift=1, separate=True
    ),
    "volume 4 x 4 x 4, d 16, grid": functools.partial(volume, window=(4, 4, 4), head_dim=16, layout="grid"),
    "keys around 2 x 2 x 2, d 8, timm": functools.partial(
        volume, window=(2, 2, 2), head_dim=8, layout="timm", margin=1, separate=True
    ),
    "keys around 16 x 16, d 30, masked": functools.partial(
        volume, window=(16, 16), head_dim=30, layout="masked", margin=4
    ),
    "embed 8, 88 channels": functools.partial(embed, kernel=8, channels=88, dilation=1, norm=True),
    "embed 4, 32 channels, dilated": functools.partial(embed, kernel=4, channels=32, dilation=2, norm=True),
    "embed 7, 180 channels, no norm": functools.partial(embed, kernel=7, channels=180, dilation=1, norm=False),
    "merge 4, 88 channels": functools.partial(merge, kernel=4, channels=88, order="unfold"),
    "merge 2, 96 channels": functools.partial(merge, kernel=2, channels=96, order="timm"),
    "merge 3, 16 channels": functools.partial(merge, kernel=3, channels=16, order="unfold"),
    "gelu": functools.partial(gelu, approximate="none", biased=True),
    "gelu tanh": functools.partial(gelu, approximate="tanh", biased=False),
    "square": square,
    "position bias": position_bias,
}


def launches(name: str, dtype: torch.dtype, architecture: int) -> list[Launch]:
    """Launches of a call on such a GPU."""
    return launches_of(functools.partial(CALLS[name], dtype), architecture)


def compile_each(found: list[Launch], architecture: int) -> None:
    for launch in found:
        report = launch.compile(architecture)
        assert report.shared_bytes <= (99 if architecture == 80 else 227) * 1024, report
        assert report.stack_pointer_uses == 0, report


@pytest.mark.slow
def test_every_kernel_compiles_in_float32():
    """Narrow heads, whose products sum over the fewest channels, and one case of each other kernel."""
    names = ("attention 12 x 12, d 4, plain", "embed 4, 32 channels, dilated", "merge 3, 16 channels", "gelu tanh")
    compile_each([launch for name in names for launch in launches(name, torch.float32, 90)], 90)


def test_attention_compiles_in_bfloat16():
    """Windows that are one tile, with everything that their kernels may be asked for."""
    compile_each(launches("attention 7 x 7, d 32, timm", torch.bfloat16, 90), 90)


def test_calls_start_every_kernel(root):
    """A new kernel is compiled here, too."""
    text = "\n".join(path.read_text() for path in (root / "kernels").glob("*.py"))
    kernels = {
        line[4:].partition("(")[0] for line in text.splitlines() if line.startswith("def ") and "_kernel(" in line
    }
    started = {launch.name for name in CALLS for launch in launches(name, torch.bfloat16, 90)}
    assert started == kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "dtype"),
    [(name, *target) for number, name in enumerate(CALLS) for target in TARGETS[number % 2]],
)
def test_every_kernel_compiles(name, architecture, dtype):
    if triton_versions.OLD and architecture == 100:
        pytest.skip("the compiler of Triton 3.6 crashes on attention for Blackwell: the backend is not available there")
    compile_each(launches(name, DTYPES[dtype], architecture), architecture)
