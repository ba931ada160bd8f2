"""window_attention's Triton kernels on maps of three axes, from three maps, with a scale per head, and with windows of
keys larger than those of queries; test_window_attention_triton.py has what is the same with two axes."""

from __future__ import annotations

import math

import pytest
import torch
import triton_versions

pytest.importorskip("triton")

from test_window_attention_triton import ALL, both_ways, compare

from asvit_fast import ops
from asvit_fast.backends import use_backend
from asvit_fast.kernels.window_attention import _token_stride

# size, heads, head_dim, window, shift, layout: three axes
VOLUMES = [
    ((3, 4, 3), 2, 4, (2, 3, 2), (1, 1, 1), "masked"),
    ((2, 2, 4), 1, 8, (2, 2, 2), (1, 1, 1), "masked"),  # windows divide the map: eight regions in the last
    ((3, 4, 3), 1, 3, (2, 3, 2), (1, 2, 1), "timm"),
    ((3, 4, 4), 1, 4, (2, 2, 3), (1, 0, 2), "torchvision"),
    ((4, 3, 4), 2, 5, (2, 3, 2), (0, 0, 0), "grid"),
    ((1, 3, 3), 2, 4, (3, 2, 2), (2, 1, 0), "timm"),  # rolled by more than its depth
    ((5, 5, 4), 1, 4, (4, 5, 4), (2, 0, 1), "masked"),
    ((4, 4, 6), 1, 4, (4, 4, 5), (0, 3, 1), "torchvision"),
]
# size, heads, head_dim, window, kv_window, layout: windows of keys around those of queries
KEYS = [
    ((3, 4), 2, 4, (2, 2), (4, 4), "masked"),
    ((4, 5), 1, 5, (2, 3), (6, 3), "timm"),
    ((3, 4, 3), 1, 4, (2, 2, 2), (2, 4, 4), "torchvision"),
    ((2, 3, 2), 2, 3, (1, 2, 2), (3, 4, 2), "masked"),
    ((4, 3), 1, 4, (2, 2), (2, 2), "timm"),  # no larger
    ((6, 6), 1, 4, (5, 6), (9, 10), "masked"),
    ((6, 6), 1, 4, (5, 6), (9, 8), "timm"),
]


def compare_everything(number, size, heads, head_dim, window, shift, layout, kv_window, device) -> None:
    """In float32 and 16 bits, from one map and from three, with everything that can be given at once and with less."""
    keys, tokens, channels = math.prod(kv_window or window), math.prod(window), heads * head_dim
    for half in (False, True):
        for everything in (False, True):
            if device.type == "cpu" and everything != (half == bool(number % 2)):
                continue  # the interpreter is slow
            dtype = (torch.float16, torch.bfloat16)[number // 2 % 2] if half else torch.float32
            tensors = {"scale": (0.3 + torch.rand(heads, device=device)).to(dtype)}
            if layout in ("timm", "torchvision"):
                tensors["padding"] = torch.randn(3 * channels, device=device).to(dtype)
            if everything:
                tensors |= {"bias": torch.randn(heads, tokens, keys, device=device)}
                tensors |= {"attn_scale": torch.randn(heads, device=device)}
            qkv = torch.randn(2 if number == 0 else 1, *size, 3 * channels, device=device).to(dtype)
            maps = qkv if everything == half else strided_maps(qkv)
            compare(maps, heads, window, shift, layout=layout, kv_window=kv_window, **tensors)


def strided_maps(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v with strides of their own: channels of the fused map, contiguous, and with channels far apart."""
    q, k, v = qkv.chunk(3, -1)
    return q, k.contiguous(), v.transpose(1, -1).contiguous().transpose(1, -1)


def check_volumes(device: torch.device, chosen: slice = ALL) -> None:
    """Maps of three axes in every layout."""
    for number, case in list(enumerate(VOLUMES))[chosen]:
        compare_everything(number, *case, None, device)


def check_keys(device: torch.device, chosen: slice = ALL) -> None:
    """Windows of keys larger than those of queries; twice the same numbers."""
    for number, (size, heads, head_dim, window, kv_window, layout) in list(enumerate(KEYS))[chosen]:
        shift = (0,) * len(window)
        compare_everything(number, size, heads, head_dim, window, shift, layout, kv_window, device)
    qkv, gradient = torch.randn(1, 5, 4, 24, device=device), torch.randn(1, 5, 4, 8, device=device)
    with use_backend("triton"):
        first, second = (both_ways(qkv, 2, (2, 2), (0, 0), gradient, "timm", (6, 4)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def check(name: str, device: torch.device, case: int | None = None) -> None:
    """One of the checks, or one case of it."""
    one = ALL if case is None else slice(case, case + 1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    {"volumes": check_volumes, "keys": check_keys}[name](device, one)


@triton_versions.interpreter
@pytest.mark.parametrize("name", ["volumes", "keys"])
@pytest.mark.slow
def test_interpreted(name, root):
    triton_versions.run_interpreted(__name__, name, root)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "case"),
    [*(("volumes", case) for case in range(len(VOLUMES))), *(("keys", case) for case in range(len(KEYS)))],
)
def test_on_a_gpu(name, case, poison_empty):
    check(name, torch.device("cuda"), case)


# --------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_volumes_compiled(dtype):
    """The windows of networks on volumes and videos, with bias and shift: no register is spilled on Hopper."""
    import triton_cases

    labels = {triton_cases.label_of(shape) for shape in (*triton_cases.VOLUMES, *triton_cases.OVERLAPS)}
    found = list(triton_cases.cases([90], [dtype], labels.__contains__))
    assert {case.label for case in found} == labels
    for case in found:
        triton_versions.assert_no_spills(case.launch.compile(90))


def test_maps_are_read_in_place():
    """Where all tokens are as far apart and channels are neighbours; the distance is a constant of the kernel."""
    from triton_cases import launches_of

    fused = torch.zeros(2, 4, 6, 48)
    q, k, v = fused.chunk(3, -1)  # [2, 4, 6, 16]
    assert [_token_stride(x) for x in (fused, q, v, q[:, :, :1, :], q[:1, 1:2])] == [48, 48, 48, 288, 48]
    assert _token_stride(fused[:, ::2]) is _token_stride(fused[:, :, 1:]) is _token_stride(fused[..., ::3]) is None
    assert _token_stride(torch.zeros(1, 1, 1, 8)) == 8 and _token_stride(torch.zeros(8).expand(2, 4, 6, 8)) == 0

    def strides(maps) -> tuple:
        (launch,) = launches_of(lambda: ops.window_attention(maps, 2, (2, 3)), 90)
        return launch.constants["SHAPE"].strides

    assert strides(fused) == (48, 48, 48)
    assert strides((q, k.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2))) == (48, 16, 16)  # v is copied
