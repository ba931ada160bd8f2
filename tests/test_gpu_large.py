"""Ops on a GPU on tensors of more than 2^31 elements: offsets of 64 bits, forward and backward.

Run alone, as they take most of a GPU's memory; the rehearsal on a CPU runs them on small tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from asvit_fast import backends, ops

pytestmark = pytest.mark.gpu
ELEMENTS = 2**31 + 1
NEEDED = 40 << 30  # bytes that have to be free
PIECES = 7  # that sums over all samples are compared in
TOLERANCE = 2e-2  # relative, of bfloat16


@dataclass(frozen=True)
class Large:
    """A call of an op on so many samples that its activations are large.

    Attributes:
        name: of the case.
        backend: that runs it on a GPU.
        call: activations, parameters -> output.
        sample: shape of the activations of one sample; of stacks with derivatives [orders + 1, ...], which are left
            out of it.
        parameters: their shapes.
        orders: rows of a stack; 0 for other ops. Samples are along the axis behind.
        differentiated: whether gradients are asked for, and of the activations, too.
    """

    name: str
    backend: str
    call: Callable[..., Tensor]
    sample: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    orders: int = 0
    differentiated: tuple[bool, bool] = (True, True)

    def __str__(self) -> str:
        return self.name

    @property
    def axis(self) -> int:
        """Of the samples."""
        return int(self.orders > 0)

    def shape(self, elements: int) -> tuple[int, ...]:
        """Of activations with more elements than that."""
        samples = elements // (max(1, self.orders) * math.prod(self.sample)) + 1
        return (*(self.orders,) * self.axis, samples, *self.sample)


def embed(image: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
    return ops.patch_embed(image, weight, vectors[0], 4, 1, (0, 0, 0, 0), *vectors[1:])


WIDE = partial(Large, orders=3, differentiated=(False, False))
CASES = [
    Large(
        "window_attention, one tile", "triton",
        lambda qkv, bias: ops.window_attention(qkv, 3, (7, 7), (3, 3), bias), (56, 56, 288), ((3, 49, 49),),
    ),
    Large(
        "window_attention, blocks", "triton",
        lambda qkv, bias: ops.window_attention(qkv, 8, (14, 14), (7, 7), bias), (28, 28, 192), ((8, 196, 196),),
    ),
    Large(
        "patch_embed", "triton", embed,
        (3, 224, 224), ((48, 3, 4, 4), (48,), (48,), (48,)), differentiated=(True, False),
    ),
    Large(
        "patch_merge", "triton", lambda x, weight, *norm: ops.patch_merge(x, weight, 2, 2, *norm),
        (56, 56, 96), ((192, 384), (384,), (384,)),
    ),
    WIDE("gelu_taylor, triton", "triton", lambda x, bias: ops.gelu_taylor(x, "none", bias), (96,), ((96,),)),
    WIDE("gelu_taylor, cuda", "cuda", lambda x, bias: ops.gelu_taylor(x, "none", bias), (96,), ((96,),)),
    WIDE("square_taylor, triton", "triton", ops.square_taylor, (96,)),
    WIDE("square_taylor, cuda", "cuda", ops.square_taylor, (96,)),
    WIDE("tanh_taylor", "cuda", ops.tanh_taylor, (96,)),
    WIDE("softmax_taylor", "cuda", ops.softmax_taylor, (49,)),
    WIDE("layer_norm_taylor", "cuda", ops.layer_norm_taylor, (96,), ((96,), (96,))),
    WIDE(
        "window_attention_taylor", "cuda", lambda qkv: ops.window_attention_taylor(qkv, 8, (7, 7)), (28, 28, 192),
    ),
]  # fmt: skip


@pytest.fixture
def elements(gpu: torch.device) -> Iterator[int]:
    """How many to go beyond; few in a rehearsal."""
    if gpu.type == "cpu":
        yield 2**12
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < NEEDED:
        pytest.skip(f"not enough memory: {free / 2**30:.0f} GiB are free, {NEEDED >> 30} GiB are needed")
    yield ELEMENTS
    torch.cuda.empty_cache()


def close(found: Tensor, expected: Tensor) -> bool:
    """Relative to the norm: rounding of bfloat16, and another order of summation."""
    return bool((found.double() - expected.double()).norm() <= TOLERANCE * expected.double().norm())


def gradients(one: Large, x: Tensor, parameters: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    """Of the activations, if they are differentiated, and of the parameters."""
    x = x.detach().requires_grad_(one.differentiated[1])
    leaves = [*([x] if one.differentiated[1] else []), *parameters]
    return list(torch.autograd.grad(one.call(x, *parameters), leaves, direction))


@pytest.mark.parametrize("one", CASES, ids=str)
def test_more_than_2_to_the_31_elements(one: Large, gpu: torch.device, elements: int) -> None:
    """Samples anywhere are what they are alone; sums over all samples are those over pieces."""
    forced = backends.use_backend(one.backend) if gpu.type == "cuda" else contextlib.nullcontext()
    torch.manual_seed(0)
    draw = partial(torch.randn, device=gpu, dtype=torch.bfloat16)
    x = draw(one.shape(elements))
    parameters = [draw(shape).requires_grad_() for shape in one.parameters]
    samples, axis = x.shape[one.axis], one.axis
    assert x.numel() > elements
    places = (0, samples // 2, samples - 1)
    with forced:
        with torch.no_grad():
            y = one.call(x, *parameters)
            for place in places:
                alone = one.call(x.narrow(axis, place, 1).clone(), *parameters)
                assert close(y.narrow(axis, place, 1), alone), f"output of sample {place} of {samples}"
        if not one.differentiated[0]:
            return
        direction = torch.randn_like(y)
        del y
        found = gradients(one, x, parameters, direction)
        for place in places if one.differentiated[1] else ():
            alone, *_ = gradients(one, x[place : place + 1].clone(), parameters, direction[place : place + 1].clone())
            assert close(found[0][place : place + 1], alone), f"gradient of sample {place} of {samples}"
        of_parameters = found[int(one.differentiated[1]) :]
        del found
        sums = [torch.zeros_like(gradient, dtype=torch.float32) for gradient in of_parameters]
        for piece, part in zip(x.tensor_split(PIECES), direction.tensor_split(PIECES), strict=True):
            if len(piece):
                for total, gradient in zip(sums, gradients(one, piece, parameters, part)[-len(sums) :], strict=True):
                    total += gradient
        for number, (gradient, total) in enumerate(zip(of_parameters, sums, strict=True)):
            assert close(gradient, total), f"gradient of parameter {number}"
