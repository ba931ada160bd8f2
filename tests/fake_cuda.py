"""A machine with one Hopper GPU, as far as Python can tell: torch gets answers about devices, tensors are fake.

Python code for CUDA (dispatch, tracing, the host side of launches) can run so without a GPU; nothing is computed. It
changes torch for good and belongs into a process of its own, with the library of fake_cuda_runtime.c loaded first.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch
import torch._dynamo.convert_frame
import torch._subclasses.fake_tensor
import torch.cuda
import torch.cuda.random
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

HOPPER = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block_optin=227 << 10,
    gcnArchName="",
    uuid="",
)


def install() -> None:
    """Answer torch's questions. What breaks a compiled graph on a real GPU still does, as the functions that are
    replaced are below those that Dynamo knows."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda._is_in_bad_fork = lambda: False
    torch.cuda._get_device_properties = lambda index: HOPPER
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.backends.cudnn.enabled = False  # to choose a convolution or an attention, C++ asks about the device
    for enable in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(False)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
        module.set_rng_state = lambda *_, **__: None
    torch._subclasses.fake_tensor.init_gpu_context = lambda *_: None


@contextlib.contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Tensors made inside of the block have shapes, types and devices only."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def to_fake_gpu(model: nn.Module) -> nn.Module:
    """Inside of `fake_tensors`, the model itself with parameters and buffers on the GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return model
