"""Windowed attention on Taylor series: every implementation against float64, gradients, transforms, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from stacked import far_apart
from torch import Tensor

from asvit_fast import _extension, backends
from asvit_fast.errors import InputError
from asvit_fast.ops.window_attention import window_attention, window_attention_reference
from asvit_fast.ops.window_attention_taylor import (
    stacked_window_attention,
    window_attention_taylor,
    window_attention_taylor_reference,
)

TINY = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 1e-2}
EXTENSION = _extension.extension()
needs_extension = pytest.mark.skipif(EXTENSION is None, reason=str(_extension.reason()))

CASES = [
    # B, H, W, heads, head_dim, window, shift, with bias
    (2, 1, 1, 1, 1, (1, 1), (0, 0), False),
    (2, 8, 8, 2, 4, (4, 4), (0, 0), False),
    (1, 6, 8, 1, 1, (3, 4), (0, 0), True),
    (2, 7, 5, 3, 3, (4, 3), (0, 0), False),
    (1, 8, 6, 2, 2, (4, 3), (2, 1), True),
    (1, 7, 9, 2, 8, (4, 4), (2, 2), True),
    (2, 5, 5, 1, 8, (7, 7), (3, 3), False),
    (1, 2, 3, 1, 5, (7, 7), (4, 0), False),  # the shift exceeds the map
    (1, 14, 14, 2, 22, (7, 7), (3, 3), False),
    (1, 15, 14, 1, 29, (14, 14), (0, 0), True),
    (1, 9, 31, 1, 45, (9, 15), (0, 0), False),
    (1, 28, 28, 1, 8, (28, 28), (0, 0), False),
    (1, 32, 40, 1, 4, (32, 32), (0, 5), False),
]


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """Run the CPU kernels with the instruction set that the test is parametrised with."""
    before = EXTENSION.get_isa()
    EXTENSION.set_isa(request.param)
    yield request.param
    EXTENSION.set_isa(before)


every_isa = pytest.mark.parametrize("isa", EXTENSION.available_isas() if EXTENSION else [], indirect=True)


def inputs(case: tuple, orders: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, tuple]:
    """qkv [orders + 1, B, H, W, 3*heads*d] and the op's other arguments."""
    batch, height, width, heads, head_dim, window, shift, with_bias = case
    generator = torch.Generator().manual_seed(orders)
    shape = (orders + 1, batch, height, width, 3 * heads * head_dim)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = None
    if with_bias:
        tokens = window[0] * window[1]
        bias = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return qkv.to(dtype).to(device), (heads, window, shift, bias)


def reference(qkv: Tensor, heads: int, window, shift=(0, 0), bias=None, scale=None) -> Tensor:
    head_dim = qkv.shape[-1] // (3 * heads)
    q, k, v = qkv.unflatten(4, (3, heads, head_dim)).unbind(4)
    factor = head_dim**-0.5 if scale is None else scale
    return window_attention_taylor_reference(q, k, v, list(window), list(shift), bias, factor)


def exact(qkv: Tensor, heads: int, window, shift=(0, 0), bias=None, scale=None) -> Tensor:
    """In float64 on the CPU."""
    wide = None if bias is None else bias.detach().cpu().double()
    return reference(qkv.detach().cpu().double(), heads, window, shift, wide, scale)


def error(y: Tensor, truth: Tensor) -> float:
    return (y.detach().cpu().double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_as_good_as_reference(y: Tensor, qkv: Tensor, arguments: tuple, tiny: float = 0.0) -> None:
    """Order by order: a large one must not hide another. `tiny` is relative to the largest value."""
    truth, theirs = exact(qkv, *arguments), reference(qkv, *arguments)
    assert y.shape == truth.shape and y.dtype == qkv.dtype and y.is_contiguous()
    for order in range(len(truth)):
        scale = max(1.0, truth[order].abs().max().item()) if truth.numel() else 1.0
        assert error(y[order], truth[order]) <= 2 * error(theirs[order], truth[order]) + scale * (
            tiny or TINY[qkv.dtype]
        ), order


def test_reference_equals_nested_forward_mode():
    qkv, (heads, window, shift, bias) = inputs(CASES[5], 2, torch.float64)

    def attend(t: Tensor) -> Tensor:
        at = qkv[0] + t * (qkv[1] + t / 2 * qkv[2])
        return window_attention_reference([at], heads, list(window), list(shift), bias)

    def velocity(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(attend, (t,), (torch.ones_like(t),))

    zero = torch.zeros((), dtype=torch.float64)
    (value, first), (_, second) = torch.func.jvp(velocity, (zero,), (torch.ones_like(zero),))
    truth = torch.stack([value, first, second])
    torch.testing.assert_close(reference(qkv, heads, window, shift, bias), truth, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):  # the comparison sees an error of one part in a million
        torch.testing.assert_close(reference(qkv * (1 + 1e-6), heads, window, shift, bias), truth, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orders", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(device, case, orders, dtype):
    qkv, arguments = inputs(case, orders, dtype, device)
    assert_as_good_as_reference(window_attention_taylor(qkv, *arguments), qkv, arguments)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("orders", [0, 1, 2])
@pytest.mark.parametrize("case", CASES[:9], ids=str)
def test_half_precision(device, case, orders, dtype):
    qkv, arguments = inputs(case, orders, dtype, device)
    assert_as_good_as_reference(window_attention_taylor(qkv, *arguments), qkv, arguments)


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orders", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_isa(isa, case, orders, dtype):
    qkv, arguments = inputs(case, orders, dtype)
    with backends.use_backend("cpu"):
        y = window_attention_taylor(qkv, *arguments)
    assert_as_good_as_reference(y, qkv, arguments)


@needs_extension
@every_isa
@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 129, 1024])
def test_every_number_of_tokens(isa, tokens):
    qkv, arguments = inputs((1, 1, tokens, 2, 3, (1, tokens), (0, 0), False), 2)
    assert_as_good_as_reference(window_attention_taylor(qkv, *arguments), qkv, arguments)


def test_order_zero_is_window_attention(device):
    on_cpu = device.type == "cpu"  # a GPU has no kernel of window_attention for float64
    dtype, tolerance = (torch.float64, {}) if on_cpu else (torch.float32, {"rtol": 1e-4, "atol": 1e-4})
    for case in CASES:
        qkv, arguments = inputs(case, 0, dtype, device)
        found, expected = window_attention_taylor(qkv, *arguments)[0], window_attention(qkv[0], *arguments)
        torch.testing.assert_close(found, expected, **tolerance)


def test_scale(device):
    qkv, (heads, window, *_) = inputs(CASES[1], 2, device=device)
    truth = exact(qkv, heads, window, scale=-1.5)
    y = window_attention_taylor(qkv, heads, window, scale=-1.5)
    assert error(y, truth) <= 1e-5 * truth.abs().max().item()


# --------------------------------------------------------------------------- hard numbers


@needs_extension
@every_isa
@pytest.mark.parametrize("largest", [1e2, 1e4])
@pytest.mark.parametrize("tokens", [9, 200])
def test_large_scores(isa, tokens, largest):
    """Also when the dominant key comes late, and moves much faster than those before it."""
    qkv, arguments = inputs((1, 1, tokens, 2, 8, (1, tokens), (0, 0), False), 2)
    head_dim_sum = qkv[0].abs().square().mean() * 8**0.5
    qkv[0, ..., :32] *= (largest / head_dim_sum).sqrt()
    qkv[1, ..., -1, 16:32] += 100.0
    rounding = 2e-7 * largest  # of the scores themselves, with and without fused multiply-add
    assert_as_good_as_reference(window_attention_taylor(qkv, *arguments), qkv, arguments, rounding)


@needs_extension
@every_isa
@pytest.mark.parametrize("orders", [1, 2])
def test_common_offset_cancels(isa, orders):
    """softmax ignores what all scores of a row share, in every order."""
    case = (1, 1, 150, 1, 4, (1, 150), (0, 0), False)
    qkv, arguments = inputs(case, orders)
    for order in range(1, orders + 1):
        qkv[order, ..., 4:8] += 1000.0  # the same for every key
    assert_as_good_as_reference(window_attention_taylor(qkv, *arguments), qkv, arguments)


@needs_extension
@every_isa
def test_masking_by_the_bias(isa):
    """-inf for all keys of the first tile: their sums are empty, not NaN."""
    qkv, (heads, window, shift, _) = inputs((1, 1, 200, 1, 4, (1, 200), (0, 0), False), 2)
    bias = torch.zeros(1, 200, 200)
    bias[:, :100, :130] = float("-inf")
    arguments = heads, window, shift, bias
    y = window_attention_taylor(qkv, *arguments)
    assert y.isfinite().all()
    assert_as_good_as_reference(y, qkv, arguments)


@needs_extension
@every_isa
@pytest.mark.parametrize("tokens", [5, 100])
def test_scattered_masks(isa, tokens):
    """-inf at random; a query without any key is NaN in every order, as torch's softmax has it."""
    qkv, (heads, window, shift, _) = inputs((1, 1, tokens, 2, 4, (1, tokens), (0, 0), False), 2)
    masked = torch.rand(2, tokens, tokens, generator=torch.Generator().manual_seed(0)) < 0.8
    alone = 3  # this query's keys are all masked
    masked[:, alone] = True
    masked[:, torch.arange(tokens) != alone, 1] = False
    bias = torch.zeros(2, tokens, tokens).masked_fill(masked, float("-inf"))
    y = window_attention_taylor(qkv, heads, window, shift, bias)
    assert y[:, :, :, alone].isnan().all() and reference(qkv, heads, window, shift, bias)[:, :, :, alone].isnan().all()
    others = torch.arange(tokens) != alone
    truth = exact(qkv, heads, window, shift, bias)[:, :, :, others]
    assert y[:, :, :, others].isfinite().all()
    assert error(y[:, :, :, others], truth) <= 1e-5 * truth.abs().max().item()


@needs_extension
@every_isa
def test_nan_stays_where_it_is(isa):
    qkv, arguments = inputs((1, 1, 40, 1, 4, (1, 20), (0, 0), False), 2)
    qkv[0, 0, 0, 3, 5] = float("nan")  # a key of the first window
    y = window_attention_taylor(qkv, *arguments)
    assert y[:, :, :, :20].isnan().all() and y[:, :, :, 20:].isfinite().all()


@needs_extension
@every_isa
def test_denormals(isa):
    qkv, arguments = inputs(CASES[1], 2)
    qkv[1:] *= 1e-39
    qkv[0, ..., 16:] *= 1e-39
    y = window_attention_taylor(qkv, *arguments)
    truth = exact(qkv, *arguments)
    assert (y.double() - truth).abs().max() < 1e-44


# --------------------------------------------------------------------------- layouts


def test_strides_are_read_in_place(device):
    qkv, arguments = inputs(CASES[5], 2, device=device)
    y = window_attention_taylor(qkv, *arguments)
    channels_first = qkv.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    padded = torch.randn(*qkv.shape[:4], qkv.shape[4] + 5, device=device)
    padded[..., 3:-2] = qkv
    for view in (channels_first, padded[..., 3:-2], qkv.flip(0).flip(0), qkv[:, :1].expand(-1, 3, -1, -1, -1)):
        expected = y.expand(-1, view.shape[1], -1, -1, -1)
        torch.testing.assert_close(window_attention_taylor(view, *arguments), expected)


def test_separate_operands(device):
    """[B, heads, tokens, d] as attention modules have them."""
    q, k, v = (torch.randn(3, 2, 4, 30, 5, device=device).transpose(2, 3).unsqueeze(2) for _ in range(3))
    y = stacked_window_attention(q, k, v, [1, 30], [0, 0], None, 0.3)
    truth = window_attention_taylor_reference(q.double(), k.double(), v.double(), [1, 30], [0, 0], None, 0.3)
    assert error(y, truth.cpu()) < 1e-5 * truth.abs().max().item()


@pytest.mark.parametrize("shape", [(3, 0, 4, 4, 12), (2, 2, 0, 4, 12), (1, 2, 4, 0, 12)])
def test_empty(device, shape):
    y = window_attention_taylor(torch.zeros(shape, device=device), 2, (2, 2), (1, 0))
    assert y.shape == (*shape[:4], 4)


def test_does_not_write_into_its_input(device):
    qkv, arguments = inputs(CASES[5], 2, device=device)
    before = qkv.clone()
    window_attention_taylor(qkv, *arguments)
    assert torch.equal(qkv, before)


@needs_extension
def test_threads_agree():
    qkv, arguments = inputs((2, 29, 28, 2, 8, (28, 28), (0, 0), False), 2)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(window_attention_taylor(qkv, *arguments))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_many_windows(device):
    """More windows than a grid's second dimension has blocks."""
    qkv = torch.randn(2, 5, 120, 120, 3, device=device)
    y = window_attention_taylor(qkv, 1, (1, 1))
    torch.testing.assert_close(y, qkv[..., 2:])  # alone in its window, a token attends itself
    qkv, arguments = inputs((1, 400, 700, 1, 4, (2, 2), (0, 0), False), 2, device=device)  # 70,000 windows
    assert_as_good_as_reference(window_attention_taylor(qkv, *arguments), qkv, arguments)


@needs_extension
@every_isa
def test_offsets_beyond_32_bits(isa):
    qkv, (_, window, shift, _) = inputs((1, 3, 4, 2, 3, (2, 2), (1, 0), False), 1)
    qkv = qkv.unflatten(4, (3, 2, 3))  # [2, 1, 3, 4, 3, heads, d]
    view = far_apart(qkv, [2**31 + 11, 1, 2**29 - 3, 2**28 + 5, 2**20, 2**26 + 1, 2**24 + 7])
    arguments = list(window), list(shift), None, 0.5
    y = stacked_window_attention(*view.unbind(4), *arguments)
    assert torch.equal(y, stacked_window_attention(*qkv.unbind(4), *arguments))


# --------------------------------------------------------------------------- gradients, transforms, compilation

SMALL = (1, 3, 4, 2, 2, (2, 3), (1, 0), True)


@pytest.mark.parametrize("orders", [0, 1, 2])
def test_gradients(device, orders):
    qkv, (heads, window, shift, bias) = inputs(SMALL, orders, torch.float64, device)
    qkv.requires_grad_(), bias.requires_grad_()

    def attend(x: Tensor, b: Tensor) -> Tensor:
        return window_attention_taylor(x, heads, window, shift, b)

    assert torch.autograd.gradcheck(attend, (qkv, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (qkv, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_in_each_dtype(device, dtype):
    qkv, arguments = inputs(CASES[2], 2, dtype, device)
    qkv.requires_grad_()
    weights = torch.randn(3, 1, 6, 8, 1, device=device).to(dtype)
    (ours,) = torch.autograd.grad(window_attention_taylor(qkv, *arguments), qkv, weights)
    (theirs,) = torch.autograd.grad(reference(qkv, *arguments), qkv, weights)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("requires_grad", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(device, requires_grad):
    qkv, (heads, window, shift, bias) = inputs(SMALL, 2, device=device)
    q, k, v = (x.clone().requires_grad_(requires_grad) for x in qkv.unflatten(4, (3, heads, -1)).unbind(4))
    arguments = (q, k, v, list(window), list(shift), bias if requires_grad else None, 0.7)
    torch.library.opcheck(torch.ops.asvit_fast.window_attention_taylor.default, arguments)


def test_compile(device):
    heads, window, shift = 2, (2, 3), (1, 0)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return (window_attention_taylor(x.sin(), heads, window, shift, bias) ** 2).sum()

    qkv, (*_, bias) = inputs(SMALL, 2, device=device)
    qkv.requires_grad_(), bias.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, bias), loss(qkv, bias))
    ours = torch.autograd.grad(compiled(qkv, bias), (qkv, bias))
    torch.testing.assert_close(ours, torch.autograd.grad(loss(qkv, bias), (qkv, bias)))


def forward_mode(function, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f, in_dims=1, out_dims=1)(torch.stack([x, x.sin()], 1)),
    "vmap(grad)": lambda f, x: torch.vmap(torch.func.grad(lambda z: f(z).square().sum()))(torch.stack([x, x.sin()])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "forward mode": lambda f, x: forward_mode(f, x, x.cos()),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda z: f(z).square().sum())(x),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms(name, compiled):
    qkv, (heads, window, shift, bias) = inputs((1, 2, 3, 1, 1, (2, 2), (1, 0), True), 2, torch.float64)

    def run(function) -> Tensor:
        return TRANSFORMS[name](lambda x: function(x, heads, window, shift, bias), qkv)

    ours = torch.compile(run, backend="aot_eager") if compiled else run
    torch.testing.assert_close(ours(window_attention_taylor), run(reference))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return window_attention_taylor(x, 2, (2, 3))

    qkv, _ = inputs(SMALL, 1)
    torch.testing.assert_close(torch.export.export(Module(), (qkv,)).module()(qkv), Module()(qkv))


# --------------------------------------------------------------------------- backends, bad input


def test_reference_backend_is_used_when_forced():
    qkv, arguments = inputs(CASES[5], 2)
    with backends.use_backend("reference"):
        assert torch.equal(window_attention_taylor(qkv, *arguments), reference(qkv, *arguments))


def test_bad_input():
    qkv = torch.zeros(2, 1, 4, 4, 12)
    with pytest.raises(InputError, match=r"0 to 2 orders, got shape \(4, 1, 4, 4, 12\)"):
        window_attention_taylor(torch.zeros(4, 1, 4, 4, 12), 2, (2, 2))
    with pytest.raises(InputError, match=r"floating point, got torch\.int64"):
        window_attention_taylor(qkv.long(), 2, (2, 2))
    with pytest.raises(InputError, match="12 channels are not 3 \\* 5 heads"):
        window_attention_taylor(qkv, 5, (2, 2))
    with pytest.raises(InputError, match=r"shift must be from 0 to window - 1, got \[2, 0\] for windows \[2, 2\]"):
        window_attention_taylor(qkv, 2, (2, 2), (2, 0))
    with pytest.raises(InputError, match=r"bias must be \[2, 4, 4\], got \[2, 4, 3\]"):
        window_attention_taylor(qkv, 2, (2, 2), bias=torch.zeros(2, 4, 3))
    with pytest.raises(InputError, match=r"bias must be torch\.float32 .* got torch\.float64"):
        window_attention_taylor(qkv, 2, (2, 2), bias=torch.zeros(2, 4, 4, dtype=torch.float64))


@needs_extension
def test_compiled_op_checks_for_itself():
    op = torch.ops.asvit_fast_C.window_attention_taylor
    q = torch.zeros(2, 1, 4, 4, 2, 2)
    with pytest.raises(ValueError, match="0 to 2 orders"):
        op(q[0], q[0], q[0], [2, 2], [0, 0], None, 1.0)
    with pytest.raises(ValueError, match="same shape"):
        op(q, q[:, :, :2], q, [2, 2], [0, 0], None, 1.0)
    with pytest.raises(ValueError, match="0 <= shift < window"):
        op(q, q, q, [2, 2], [2, 0], None, 1.0)
    with pytest.raises(ValueError, match=r"bias must be \[2, 4, 4\]"):
        op(q, q, q, [2, 2], [0, 0], torch.zeros(2, 4, 5), 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        op(q, q.double(), q, [2, 2], [0, 0], None, 1.0)
