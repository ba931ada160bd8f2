"""Launches by kernels/launch.py and by Triton itself on a GPU that is not there, with Triton's own launcher; see
test_cuda_tracing.py. Tensors are the CPU's: nothing is computed. Prints what the driver saw, as JSON."""

from __future__ import annotations

import ctypes
import json
import os

import fake_cuda
import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from asvit_fast.kernels import tile_table
from asvit_fast.kernels.window_attention import window_attention

driver = ctypes.CDLL(None)  # the library that was loaded before all others
driver.launch_count.restype = ctypes.c_long
driver.launch_name.restype = ctypes.c_char_p
driver.launch_argument.restype = ctypes.c_void_p
by_triton, hooked = [], []  # launches that went through JITFunction.run, and that a hook saw


def install() -> None:
    """Triton finds a Hopper GPU, whose tensors are those of the CPU."""
    fake_cuda.install()
    active, run = CudaDriver(), JITFunction.run
    active.get_current_device = lambda: 0
    active.get_device_capability = lambda device: (9, 0)
    active.get_current_stream = lambda device: 0
    triton.runtime.driver.set_active(active)

    def counted(kernel: JITFunction, *arguments: object, **named: object) -> object:
        by_triton.append(kernel.__name__)
        return run(kernel, *arguments, **named)

    JITFunction.run = counted


def start(qkv: torch.Tensor, bias: torch.Tensor) -> dict[str, object]:
    """One launch of a window attention, as the driver saw it."""
    before = driver.launch_count(), len(by_triton), len(hooked)
    output = window_attention(qkv, None, None, bias, None, None, None, 2, [7, 7], [3, 3], [], 0.5, "masked", None)
    tensors = (qkv, qkv, qkv, qkv, bias, qkv, qkv, output)  # as the kernel takes them
    return {
        "launches": driver.launch_count() - before[0],
        "by Triton": len(by_triton) - before[1],
        "hooked": len(hooked) - before[2],
        "name": driver.launch_name().decode(),
        "grid": driver.launch_grid(),
        "arguments fit": [driver.launch_argument(i) for i in range(8)] == [x.data_ptr() for x in tensors],
    }


def main() -> None:
    install()
    found = {}
    with tile_table.assuming("hopper"):
        qkv, bias = torch.randn(2, 14, 14, 48).bfloat16(), torch.randn(2, 49, 49)
        found["first"], found["second"] = start(qkv, bias), start(qkv.clone(), bias.clone())
        found["other dtype"] = start(qkv, bias.bfloat16())
        found["unaligned"] = start(qkv, torch.randn(2 * 49 * 49 + 1)[1:].view(2, 49, 49))
        found["aligned again"] = start(qkv, bias)
        knobs.runtime.launch_enter_hook.add(hooked.append)
        found["launch hook"] = start(qkv, bias)
        knobs.runtime.launch_enter_hook.remove(hooked.append)
        knobs.runtime.debug = True
        found["debug"] = start(qkv, bias)
        knobs.runtime.debug = False
        found["other batch"] = start(qkv[:1], bias)
        found["other batch again"] = start(qkv[:1], bias)
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
