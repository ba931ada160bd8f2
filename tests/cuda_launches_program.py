"""The host side of Triton launches, and passes that are not compiled, on a GPU that is not there; see
test_cuda_tracing.py. Prints the kernels that were started, as JSON."""

from __future__ import annotations

import importlib
import json
import os
import warnings

import fake_cuda
import torch
from cuda_tracing_program import make
from triton.runtime.jit import JITFunction

import asvit_fast as af
from asvit_fast.backends import FallbackWarning

attention, embedding, merging = (
    importlib.import_module(f"asvit_fast.ops.{name}") for name in ("window_attention", "patch_embed", "patch_merge")
)


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def launch_all(dtype: torch.dtype) -> None:
    """Each op's Triton implementation, forward and backward."""
    from asvit_fast.kernels import gelu_taylor
    from asvit_fast.kernels import window_attention as attention_kernels

    def new(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=dtype)

    for side, head_dim in ((7, 8), (12, 45)):
        qkv, channels = new(2, 2 * side - 1, 2 * side, 6 * head_dim), 6 * head_dim
        others = (new(2, side**2, side**2), new(channels), new(2))
        settings = attention.Settings(2, [side, side], [2, 3], 0.5, "timm")
        output, statistics = attention._triton((qkv, *others), settings)
        kept = None if attention._whole(qkv, 2, [side, side]) else statistics
        found = attention_kernels.window_attention_backward(output, qkv, output, kept, *settings, *others, [True] * 3)
        assert [x.shape for x in found] == [x.shape for x in (qkv, *others)]
    operands = (new(2, 3, 40, 40), new(32, 3, 7, 7), new(32), new(32), new(32))
    settings = embedding.Settings(4, 1, [2, 1, 2, 1], 1e-5, dtype, dtype)
    output, values = embedding._triton(operands, settings, False)
    found = embedding._fused_backward(embedding._triton, output, operands, settings, values, True, True)
    assert [x.shape for x in found] == [output.shape, *(x.shape for x in operands[1:])]
    operands = (new(2, 9, 8, 16), new(32, 144), new(144), new(144), new(32))
    settings = merging.Settings(3, 2, 1e-5, False)
    output, statistics = merging._triton(operands, settings)
    found = merging._fused_backward(merging._triton, output, operands, settings, statistics, True, True)
    assert [x.shape for x in found if x is not None] == [x.shape for x in operands]
    gelu_taylor.gelu_taylor(new(3, 4, 16), "none", new(16))


def run_eagerly(model: torch.nn.Module, size: int) -> None:
    """A training pass and Taylor passes of both orders."""
    fake_cuda.to_fake_gpu(model)
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
