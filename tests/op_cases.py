"""Every op on small shapes that start every kernel of ours, against float64 on the CPU; also a program of its own:

    python tests/op_cases.py [--device cuda] [--dtype bfloat16 ...] [--case NAME ...]

runs the cases one after the other, forward and backward, prints a line for each, and ends with exit code 1 if one is
wrong. It needs no pytest, so that a sanitizer can be put before it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accuracy import TINY, assert_accurate
from torch import Tensor

from asvit_fast import backends, ops

HEADS = (2,)  # shape of what has a number for each head
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions of float32, too, in float32 inside the block: torch's default is TF32, which our kernels follow."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@dataclass(frozen=True)
class OpCase:
    """One call of an op.

    Attributes:
        name: of the case.
        op: as ``backends`` knows it.
        backend: that runs it on a GPU; "reference" for what torch's own functions run there.
        call: operands -> output.
        shapes: of the operands, all of which are differentiated. The first one is the activations.
    """

    name: str
    op: str
    backend: str
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.name

    def operands(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Noise, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes)
        return [self._scaled(x).to(device, dtype) for x in drawn]

    def _scaled(self, x: Tensor) -> Tensor:
        """Weights of products that do not grow with their length, and moderate scales of heads; the rest is normal."""
        if self.op in ("linear", "patch_embed", "patch_merge") and tuple(x.shape) == self.shapes[1]:
            return x / x[0].numel() ** 0.5
        return 0.2 + 0.1 * x.abs() if tuple(x.shape) == HEADS else x

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Our kernel on a GPU, and in Triton's interpreter; on a CPU else whatever runs there."""
        interpreted = self.backend == "triton" and backends.available(self.op, "triton", device) is None
        forced = device.type == "cuda" or interpreted
        return backends.use_backend(self.backend) if forced else contextlib.nullcontext()

    def forward(self, operands: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), self.on(operands[0].device):
            return [self.call(*operands)]

    def both(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The output, and the gradients of all operands along a fixed direction."""
        leaves = [x.detach().requires_grad_() for x in operands]
        with torch.enable_grad(), self.on(operands[0].device):
            output = self.call(*leaves)
            direction = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
            return [output.detach(), *torch.autograd.grad(output, leaves, direction)]

    def check(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        """error(ours) < 2 error(plain PyTorch operations, same dtype) + tiny, against float64 on the CPU.

        Raises AssertionError, which says what is wrong, and InputError where our kernel cannot run.
        """
        operands = self.operands(dtype, device, seed)
        wide = [x.cpu().double() for x in operands]
        with full_precision():
            ours = self.both(operands)
        with full_precision(), backends.use_backend("reference"):
            theirs, exact = (OpCase(self.name, self.op, "reference", self.call, self.shapes).both(x)
                             for x in (operands, wide))  # fmt: skip
        names = ("output", *(f"gradient {number}" for number in range(len(operands))))
        for name, got, other, want in zip(names, ours, theirs, exact, strict=True):
            assert (got.dtype, got.device) == (dtype, operands[0].device), f"{name}: {got.dtype} on {got.device}"
            # of a scale of each head: a sum over all tokens that may cancel
            sums = operands[0][..., 0].numel() if tuple(want.shape) == HEADS else 1
            assert_accurate(name, got.cpu(), other.cpu(), want, TINY[dtype] * sums**0.5)


def _attention(heads: int, window: tuple[int, ...], shift: tuple[int, ...], layout: str, *given: str,
               kv_window: tuple[int, ...] | None = None) -> Callable[..., Tensor]:  # fmt: skip
    """``window_attention`` with further operands by name."""

    def call(qkv: Tensor, *others: Tensor) -> Tensor:
        named = dict(zip(given, others, strict=True))
        return ops.window_attention(qkv, heads, window, shift, layout=layout, kv_window=kv_window, **named)

    return call


def _bias(table: Tensor) -> Tensor:
    pairs = torch.arange(9 * 12, device=table.device) * 7 % table.shape[0]
    return ops.position_bias(table, pairs.view(9, 12))


def _embed(image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return ops.patch_embed(image, weight, bias, 4, 1, (1, 2, 1, 2), norm_weight, norm_bias)


def _merge(order: str, kernel: int, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return ops.patch_merge(x, weight, kernel, 2, norm_weight, norm_bias, order=order)


def _taylor_cases() -> list[OpCase]:
    gelu = lambda x, bias: ops.gelu_taylor(x, "none", bias)  # noqa: E731
    square = [OpCase(f"square_taylor, {b}", "square_taylor", b, ops.square_taylor, ((3, 37, 20),)) for b in BOTH]
    windows = [
        OpCase(
            f"window_attention_taylor, order {orders}, {side} x {side} windows", "window_attention_taylor", "cuda",
            lambda qkv, bias, side=side: ops.window_attention_taylor(qkv, 2, (side, side), (2, 2), bias),
            ((orders + 1, 2, 11, 11, 48), (2, side**2, side**2)),
        )
        for orders, side in ((1, 4), (2, 4), (2, 9))
    ]  # fmt: skip
    windows.append(
        OpCase(
            # on a CPU its memory would be kept
            "window_attention_taylor, more than a mebibyte", "window_attention_taylor", "cuda",
            lambda qkv: ops.window_attention_taylor(qkv, 4, (7, 7)), ((2, 8, 28, 28, 72),),
        )
    )  # fmt: skip
    return [
        *(OpCase(f"gelu_taylor, {b}", "gelu_taylor", b, gelu, ((3, 37, 20), (20,))) for b in BOTH),
        *square,
        OpCase("tanh_taylor", "tanh_taylor", "cuda", ops.tanh_taylor, ((3, 37, 20),)),
        OpCase("softmax_taylor", "softmax_taylor", "cuda", ops.softmax_taylor, ((3, 37, 49),)),
        OpCase("softmax_taylor, long rows", "softmax_taylor", "cuda", ops.softmax_taylor, ((3, 5, 3000),)),
        OpCase(
            "layer_norm_taylor", "layer_norm_taylor", "cuda", ops.layer_norm_taylor, ((3, 37, 88), (88,), (88,))
        ),
        OpCase(
            "layer_norm_taylor, long rows", "layer_norm_taylor", "cuda", ops.layer_norm_taylor,
            ((3, 5, 3000), (3000,), (3000,)),
        ),
        *windows,
    ]  # fmt: skip


BOTH = ("triton", "cuda")
CASES = [
    OpCase(
        "window_attention, one tile", "window_attention", "triton",
        _attention(2, (7, 7), (3, 3), "masked", "bias"), ((2, 16, 14, 192), (2, 49, 49)),
    ),
    OpCase(
        "window_attention, one tile, padded", "window_attention", "triton",
        _attention(2, (4, 4), (2, 2), "timm", "bias", "padding", "attn_scale"),
        ((2, 7, 9, 48), (2, 16, 16), (48,), (2,)),
    ),
    OpCase(
        "window_attention, blocks", "window_attention", "triton",
        _attention(2, (12, 11), (6, 5), "masked", "bias"), ((2, 24, 13, 48), (2, 132, 132)),
    ),
    OpCase(
        "window_attention, blocks, three axes", "window_attention", "triton",
        _attention(2, (4, 5, 4), (2, 0, 1), "torchvision", "bias", "padding", "scale"),
        ((1, 5, 5, 6, 96), (2, 80, 80), (96,), (2,)),
    ),
    OpCase(
        "window_attention, overlapping windows", "window_attention", "triton",
        _attention(2, (4, 4), (0, 0), "timm", "bias", kv_window=(6, 6)), ((2, 8, 8, 60), (2, 16, 36)),
    ),
    OpCase(
        "patch_embed", "patch_embed", "triton", _embed, ((2, 3, 33, 40), (24, 3, 7, 7), (24,), (24,), (24,)),
    ),
    OpCase(
        "patch_merge", "patch_merge", "triton", partial(_merge, "unfold", 4),
        ((2, 9, 8, 24), (40, 384), (384,), (384,)),
    ),
    OpCase(
        "patch_merge, as timm", "patch_merge", "triton", partial(_merge, "timm", 2),
        ((2, 8, 8, 32), (64, 128), (128,), (128,)),
    ),
    OpCase("position_bias", "position_bias", "triton", _bias, ((25, 3),)),
    OpCase("linear", "linear", "reference", ops.linear, ((37, 24), (40, 24), (40,))),
    *_taylor_cases(),
]  # fmt: skip


def case(name: str) -> OpCase:
    return next(one for one in CASES if one.name == name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--case", nargs="+", default=[one.name for one in CASES], choices=[one.name for one in CASES])
    parser.add_argument("--list", action="store_true", help="print backend and name of each case, and do nothing")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(f"{one.backend}\t{one.name}" for one in CASES))
        return 0
    device = backends.resolve_device(chosen.device)
    wrong = 0
    for name in chosen.case:
        for dtype in chosen.dtype:
            start, verdict = time.perf_counter(), "ok"
            try:
                case(name).check(DTYPES[dtype], device)
            except Exception as error:  # of one case; the others are worth knowing
                wrong, verdict = wrong + 1, f"WRONG: {type(error).__name__}: {error}"
            print(f"{name:46} {dtype:9} {time.perf_counter() - start:6.1f} s  {verdict}"[:400], flush=True)
    print(f"{len(chosen.case) * len(chosen.dtype) - wrong} ok, {wrong} wrong", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
