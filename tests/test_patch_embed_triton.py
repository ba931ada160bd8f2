"""patch_embed's Triton kernels: in Triton's interpreter against float64, compiled for GPUs that need not be there, and
on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
import triton_versions
from test_patch_embed import assert_as_exact, both_ways, embed, make_operands

from asvit_fast.backends import use_backend

pytest.importorskip("triton")

# batch, Cin, size, C, K, stride, dilation, padding, kinds of vectors: cut blocks of tokens, pixels and channels
SHAPES = [
    (1, 3, (16, 24), 16, 4, 4, 1, (0, 0, 0, 0), "bwo"),  # exact blocks but for the tokens
    (2, 3, (15, 18), 24, 7, 4, 1, (1, 2, 3, 0), "bwo"),
    (2, 1, (33, 25), 88, 8, 8, 2, (5, 5, 4, 3), "bw"),
    (1, 5, (20, 21), 7, 3, 2, 3, (2, 0, 2, 5), "wo"),
    (1, 3, (32, 32), 17, 5, 16, 5, (2, 2, 2, 2), "b"),
    (1, 2, (20, 20), 1, 1, 3, 1, (0, 0, 0, 0), ""),
    (1, 3, (10, 8), 48, 6, 5, 1, (9, 30, 7, 20), "bwo"),
    (1, 1, (9, 8), 270, 3, 3, 1, (0, 0, 0, 0), "bwo"),  # several blocks of channels in the weight's gradient
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on(device: torch.device, *shape, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: x.to(device, dtype) for name, x in make_operands(*shape).items()}


def check_shapes(device: torch.device, chosen: slice = slice(None)) -> None:
    """Every dtype."""
    for number, (batch, in_channels, size, channels, kernel, stride, dilation, padding, kinds) in list(
        enumerate(SHAPES)
    )[chosen]:
        for index, dtype in enumerate(DTYPES):
            if device.type == "cpu" and index != number % 3 and dtype != torch.float32:
                continue  # the interpreter is slow
            operands = on(device, batch, in_channels, size, channels, kernel, kinds, dtype=dtype)
            assert_as_exact(operands, stride, dilation, padding, backend="triton")


def check_details(device: torch.device) -> None:
    """Details that shapes do not show: layouts, frozen operands, a mean far from zero, no epsilon, determinism."""
    operands = on(device, 2, 3, (8, 12), 24, 4)
    settings, gradient = (4, 1, (1, 1, 0, 2)), torch.randn(2, 24, 2, 3, device=device).permute(0, 2, 3, 1)
    layouts = [
        operands["image"].to(memory_format=torch.channels_last),
        operands["image"].transpose(2, 3).contiguous().transpose(2, 3),
    ]
    with use_backend("triton"):
        want = both_ways(operands, gradient.contiguous(), *settings)
        for image in layouts:
            weight = operands["weight"].to(memory_format=torch.channels_last)
            got = both_ways(operands | {"image": image, "weight": weight}, gradient, *settings)
            assert all(torch.equal(got[name], want[name]) for name in want)
        again = both_ways(operands, gradient, *settings)
        assert all(torch.equal(again[name], want[name]) for name in want)
        leaf = operands["image"].clone().requires_grad_()  # all others frozen
        (alone,) = torch.autograd.grad(embed(operands | {"image": leaf}, *settings), leaf, gradient)
        assert torch.equal(alone, want["image"])
    operands["weight"] *= 1e-3
    operands["bias"] = 100.0 + 1e-3 * torch.randn(24, device=device)
    assert_as_exact(operands, *settings, backend="triton", tiny=1e-4)
    operands["bias"] = torch.zeros(24, device=device)
    assert_as_exact(operands, 4, 1, (0, 0, 0, 0), backend="triton", eps=0.0)


def check_many_tokens(device: torch.device) -> None:
    """Several blocks of tokens per program, the last of them with fewer."""
    from asvit_fast.kernels import launch

    if device.type == "cpu":
        launch.PROGRAMS = 3
    assert_as_exact(on(device, 3, 1, (26, 40), 16, 2), 2, 1, (0, 0, 0, 0), backend="triton", tiny=1e-5)


def check_autocast(device: torch.device) -> None:
    """Products in 16 bits of operands in 32: torch's types, gradients in the operands' own."""
    types = (torch.bfloat16, torch.float32)
    operands = on(device, 1, 3, (8, 12), 24, 4)
    forward = [operands[name] for name in ("image", "weight", "bias", "norm_weight", "norm_bias")]
    settings = (4, 1, [0, 0, 0, 0], 1e-5, *types)
    with use_backend("triton"):
        out, values = torch.ops.asvit_fast.patch_embed(*forward, *settings, False)
        found = torch.ops.asvit_fast.patch_embed_gradients(out, None, values, *forward, *settings, False, [True] * 5)
    with use_backend("reference"):
        exact, _ = torch.ops.asvit_fast.patch_embed(*forward, *settings, False)
    assert out.dtype == torch.float32 and {x.dtype for x in found} == {torch.float32}
    assert 1e-6 < (out - exact).abs().max() < 5e-2


def check(name: str, device: torch.device) -> None:
    """One of the checks, with memory poisoned."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    globals()[f"check_{name}"](device)


CHECKS = pytest.mark.parametrize("name", ["shapes", "details", "many_tokens", "autocast"])


@triton_versions.interpreter
@CHECKS
def test_interpreted(name, root):
    triton_versions.run_interpreted(__name__, name, root)


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_shape_on_a_gpu(case, poison_empty):
    torch.manual_seed(0)
    check_shapes(torch.device("cuda"), slice(case, case + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CHECKS.args[1] if name != "shapes"])
def test_on_a_gpu(name, poison_empty):
    check(name, torch.device("cuda"))


# --------------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ("channels", "kernel", "dtype", "capability"),
    [
        (32, 4, torch.bfloat16, 90),
        (96, 7, torch.bfloat16, 90),
        (32, 8, torch.float32, 90),
        (96, 4, torch.float32, 80),
        (32, 4, torch.bfloat16, 80),
        (32, 7, torch.bfloat16, 100),
    ],
)
def test_compiled(channels, kernel, dtype, capability):
    """For GPUs that need not be there; on Ampere and Hopper no register is spilled."""
    from triton_cases import launches_of

    operands = on(torch.device("cpu"), 2, 3, (64, 64), channels, kernel, dtype=dtype)
    padding = (0, kernel % 4, 0, kernel % 4)
    size = [(64 + kernel % 4 - kernel) // 4 + 1] * 2
    gradient = torch.zeros(2, *size, channels, dtype=dtype)
    launches = launches_of(lambda: both_ways(operands, gradient, 4, 1, padding), capability)
    assert len(launches) == 3
    for launch in launches:
        report = launch.compile(capability)
        assert report.shared_bytes <= 99 * 1024, report  # of the smallest GPUs
        if capability < 100:
            triton_versions.assert_no_spills(report)
