"""patch_merge's Triton kernels: in Triton's interpreter against float64, compiled for GPUs that need not be there,
and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
import triton_versions
from accuracy import TINY, assert_accurate
from torch import Tensor

from asvit_fast import ops
from asvit_fast.backends import use_backend

pytest.importorskip("triton")

# H, W, C, Cout, kernel, stride, order, with norm_bias, with bias
CASES = [
    (7, 5, 5, 6, 3, 2, "unfold", True, False),
    (8, 8, 32, 16, 4, 2, "unfold", True, True),
    (9, 6, 24, 70, 2, 2, "timm", True, False),
    (5, 4, 70, 9, 3, 2, "timm", False, True),
    (1, 1, 3, 2, 4, 2, "unfold", True, True),
    (6, 7, 17, 5, 1, 2, "unfold", False, False),
    (7, 7, 9, 4, 5, 3, "unfold", True, True),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(case: tuple, dtype: torch.dtype, device: torch.device, batch: int = 2) -> list[Tensor | None]:
    """x, weight, norm_weight, norm_bias, bias."""
    height, width, channels, outputs, kernel, _, _, shifted, biased = case
    features = kernel * kernel * channels
    x = torch.randn(batch, height, width, channels, device=device)
    weight = torch.randn(outputs, features, device=device) / features**0.5
    vectors = [torch.randn(size, device=device) for size in (features, features, outputs)]
    given = [x, weight, vectors[0], vectors[1] if shifted else None, vectors[2] if biased else None]
    return [None if tensor is None else tensor.to(dtype) for tensor in given]


def both_ways(given: list[Tensor | None], case: tuple, dtype: torch.dtype | None, gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of everything given."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
    out = ops.patch_merge(*leaves[:2], case[4], case[5], *leaves[2:], order=case[6])
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], gradient.to(out.dtype))]


def compare(given: list[Tensor | None], case: tuple) -> None:
    """Forward and all gradients: error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64."""
    x, weight = given[:2]
    shape = (x.shape[0], -(-x.shape[1] // case[5]), -(-x.shape[2] // case[5]), weight.shape[0])
    gradient = torch.randn(shape, device=x.device).to(weight.dtype)
    with use_backend("triton"):
        ours = both_ways(given, case, None, gradient)
    with use_backend("reference"):
        theirs = both_ways(given, case, None, gradient)
        exact = both_ways(given, case, torch.float64, gradient)
    expected = [weight.dtype, *(t.dtype for t in given if t is not None)]
    for got, other, want, dtype in zip(ours, theirs, exact, expected, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        assert_accurate(f"{tuple(want.shape)} of {case} {weight.dtype}", got, other, want, TINY[weight.dtype])


def check_shapes(device: torch.device, chosen: slice = slice(None)) -> None:
    """Every dtype, memory poisoned."""
    for number, case in list(enumerate(CASES))[chosen]:
        for index, dtype in enumerate(DTYPES):
            if device.type == "cpu" and index > 0 and index % 2 != number % 2:
                continue  # the interpreter is slow
            compare(operands(case, dtype, device), case)


def check_details(device: torch.device) -> None:
    """Details that shapes do not show: layouts, mixed types, a large mean, single gradients, determinism."""
    case = CASES[0]
    given = operands(case, torch.float32, device)
    given[0] = given[0].permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    given[1] = given[1].T.contiguous().T
    compare(given, case)
    for low in (torch.bfloat16, torch.float16):
        mixed = operands(CASES[1], torch.float32, device)
        mixed[1] = mixed[1].to(low)
        compare(mixed, CASES[1])
    for mean in (1e3, 1e4):
        inside = (6, 6, 24, 8, 2, 2, "timm", True, True)  # no padding, whose distance to the mean would be the spread
        large = operands(inside, torch.float32, device)
        large[0] = large[0] + mean
        compare(large, inside)
    for dtype in DTYPES:  # where 16 bits overflow before the normalisation, and constants hide what they are added to
        inside = (6, 6, 24, 8, 2, 2, "timm", True, True)
        huge = operands(inside, dtype, device)
        huge[0] = 6e4 * huge[0].sign()
        compare(huge, inside)
        far = operands(inside, dtype, device)
        far[4] = 3000 + 100 * far[4]
        compare(far, inside)
        alike = operands(inside, dtype, device)  # no spread, channels that are not there are far from the mean
        alike[0] = torch.full_like(alike[0], 3e4)
        compare(alike, inside)
    with use_backend("triton"):
        x, weight, *vectors = given
        x = x.clone().requires_grad_()
        out = ops.patch_merge(x, weight, 3, 2, *vectors)
        (alone,) = torch.autograd.grad(out.sum(), x)
        weight = weight.clone().requires_grad_()
        (other,) = torch.autograd.grad(ops.patch_merge(x.detach(), weight, 3, 2, *vectors).sum(), weight)
        results = [both_ways(given, case, None, torch.ones_like(out)) for _ in range(2)]
        assert all(map(torch.equal, *results))
        assert torch.equal(results[0][1], alone) and torch.equal(results[0][2], other)
        assert torch.ops.asvit_fast.patch_merge(x[:0], weight, *vectors, 3, 2, 1e-5, False)[0].shape == (0, 4, 3, 6)


def check_means(device: torch.device) -> None:
    """Means on both sides of where x is no longer multiplied as it is: 0.7, 3 and 1000 standard deviations, in 16 bits,
    and a neighbourhood of them among others."""
    inside = (6, 6, 24, 8, 2, 2, "timm", True, True)
    for dtype in (torch.float16, torch.bfloat16):
        for mean in (0.7, 3.0, 1e3):
            large = operands(inside, torch.float32, device)
            large[0] = large[0] + mean
            compare([None if x is None else x.to(dtype) for x in large], inside)
        single = operands(inside, dtype, device)
        single[0][0, 2:4, 2:4] = 1000.0
        compare(single, inside)


def check_small_gains(device: torch.device) -> None:
    """A LayerNorm's weights far below what float16 holds next to weights of the product."""
    case = (6, 6, 24, 8, 2, 2, "timm", False, False)
    given = operands(case, torch.float32, device)
    given[1], given[2] = given[1].half(), 1e-7 * given[2]
    gradient = torch.full((2, 3, 3, 8), 100.0, device=device)
    with use_backend("triton"):
        ours = both_ways(given, case, None, gradient)[1]
    with use_backend("reference"):
        exact = both_ways(given, case, torch.float64, gradient)[1]
    assert (ours - exact).norm() < 2e-3 * exact.norm()


def check_many_tokens(device: torch.device) -> None:
    """Several blocks of tokens, and several pieces of the gradient of the weights, the last of them shorter."""
    case = (34, 18, 3, 4, 2, 2, "unfold", True, True)
    compare(operands(case, torch.float32, device, 4), case)
    compare(operands(case, torch.bfloat16, device, 4), case)


def check(name: str, device: torch.device) -> None:
    """One of the checks."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    checks = {
        "shapes": check_shapes,
        "details": check_details,
        "means": check_means,
        "small gains": check_small_gains,
        "many": check_many_tokens,
    }
    checks[name](device)


QUICK, SLOW = ("shapes", "small gains"), ("details", "means", "many")


@triton_versions.interpreter
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_interpreted(name, root):
    triton_versions.run_interpreted(__name__, name, root)


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(len(CASES)))
def test_shape_on_a_gpu(case, poison_empty):
    torch.manual_seed(0)
    check_shapes(torch.device("cuda"), slice(case, case + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in (*QUICK, *SLOW) if name != "shapes"])
def test_on_a_gpu(name, poison_empty):
    check(name, torch.device("cuda"))


# --------------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "dtype", "capability"),
    [
        (32, 64, 4, torch.bfloat16, 90),
        (96, 192, 2, torch.float32, 90),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (88, 176, 4, torch.bfloat16, 90),
                (384, 768, 2, torch.bfloat16, 90),
                (128, 256, 3, torch.bfloat16, 80),
                (96, 192, 2, torch.float32, 80),
                (192, 384, 2, torch.bfloat16, 100),
            )
        ),
    ],
)
def test_compiled(channels, outputs, kernel, dtype, capability):
    """For GPUs that need not be there; no register is spilled."""
    from triton_cases import launches_of

    case = (16, 16, channels, outputs, kernel, 2, "unfold", True, True)
    given, gradient = operands(case, dtype, torch.device("cpu")), torch.zeros(2, 8, 8, outputs, dtype=dtype)
    launches = launches_of(lambda: both_ways(given, case, None, gradient), capability)
    assert len({launch.name for launch in launches}) == 6
    for launch in launches:
        report = launch.compile(capability)
        assert report.shared_bytes <= (99 if capability == 80 else 227) * 1024, report  # of the smallest GPUs
        triton_versions.assert_no_spills(report)
