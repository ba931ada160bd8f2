"""The host side of Triton launches, and passes that are not compiled, on a GPU that is not there; see
test_cuda_tracing.py. Prints the kernels that were started, as JSON."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Sequence

import fake_cuda
import torch
from cuda_tracing_program import make
from triton.runtime.jit import JITFunction

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.backends import FallbackWarning
from asvit_fast.ops.fused_op import FusedOp

attention, embedding, merging = (
    importlib.import_module(f"asvit_fast.ops.{name}") for name in ("window_attention", "patch_embed", "patch_merge")
)


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def launch(op: FusedOp, operands: Sequence[torch.Tensor | None], config: tuple[object, ...]) -> None:
    settings, everything = op.config(*config), [True] * len(operands)
    result = backends.implementation(op.name, "triton")(operands, settings)
    found = op.gradients("triton", result[0], operands, settings, result, everything)
    assert [x.shape for x in found if x is not None] == [x.shape for x in operands if x is not None]


def launch_all(dtype: torch.dtype) -> None:
    """Each op's Triton implementation, forward and backward."""
    from asvit_fast.kernels import gelu_taylor, position_bias, square_taylor

    def new(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=dtype)

    for side, head_dim in ((7, 8), (12, 45)):
        size, channels, parameters = (2, 2 * side - 1, 2 * side), 2 * head_dim, (new(6 * head_dim), new(2), new(2))
        for maps in ((new(*size, 3 * channels), None, None), [new(*size, channels) for _ in range(3)]):
            operands = (*maps, new(2, side**2, side**2), *parameters)
            launch(attention.WINDOW_ATTENTION, operands, (2, [side, side], [2, 3], [], 0.5, "timm"))
        operands = (new(2, 3, 5, 6, 3 * channels), None, None, new(2, 12, 48), *parameters)
        launch(attention.WINDOW_ATTENTION, operands, (2, [2, 2, 3], [0, 0, 0], [4, 4, 3], 0.5, "timm"))
    vectors = (new(32), new(32), new(32))
    launch(
        embedding.PATCH_EMBED,
        (new(2, 3, 40, 40), new(32, 3, 7, 7), *vectors),
        (4, 1, [2, 1, 2, 1], 1e-5, dtype, dtype, False),
    )
    launch(merging.PATCH_MERGE, (new(2, 9, 8, 16), new(32, 144), new(144), new(144), new(32)), (3, 2, 1e-5, False))
    gelu_taylor.gelu_taylor(new(3, 4, 16), "none", new(16))
    square_taylor.square_taylor(new(3, 4, 16))
    index = torch.zeros(49, 49, dtype=torch.int64, device=new(1).device)
    position_bias.position_bias_gradient(position_bias.position_bias(new(169, 3), index), index, 169)


def run_eagerly(model: torch.nn.Module, size: int) -> None:
    """A training pass and Taylor passes of both orders."""
    fake_cuda.to_fake_gpu(model)
    af.accelerate(model, strict=True)
    x = tensor(2, 3, size, size, dtype=torch.float32)
    model(x).sum().backward()
    assert all(parameter.grad.device.type == "cuda" for parameter in model.parameters())
    assert {row.device.type for row in (*af.jvp(model.eval(), x, x), *af.jet(model, x, x, x))} == {"cuda"}


def main() -> None:
    fake_cuda.install()
    warnings.simplefilter("error", FallbackWarning)
    started = set()
    JITFunction.run = lambda kernel, *_, **__: started.add(kernel.__name__)
    networks = [make(name) for name in ("as-vit", "swin")]
    with fake_cuda.fake_tensors():
        for dtype in (torch.float32, torch.bfloat16):
            launch_all(dtype)
        for model, size in networks:
            run_eagerly(model, size)
    print(json.dumps(sorted(started)), flush=True)
    os._exit(0)  # autograd's thread of the GPU does not end in order


if __name__ == "__main__":
    main()
