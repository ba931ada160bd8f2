"""patch_embed against loops written from its definition, and against torch's convolution and LayerNorm, forward and
backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from stacked import every_isa, needs_extension
from torch import Tensor
from torch_versions import DYNAMIC_DOUBLE_BACKWARD

import asvit_fast as af
from asvit_fast import ops
from asvit_fast.backends import use_backend
from asvit_fast.nn import OverlapPatchEmbed
from asvit_fast.nn.patch_embed import embed_patches


@pytest.mark.parametrize("kernel", [4, 5, 8])
@pytest.mark.parametrize(("stride", "dilation"), [(4, 1), (8, 2), (16, 5)])
@pytest.mark.parametrize("size", [(32, 32), (35, 50)])
def test_by_definition(kernel: int, stride: int, dilation: int, size: tuple[int, int], poison_empty: None) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(6, 3, kernel, kernel, dtype=torch.float64)
    bias, gain, offset = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    out = embed_patches(image, weight, bias, stride, dilation, gain, offset, 1e-5)
    rows, columns = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
    assert out.shape == (2, rows, columns, 6)
    before = max(dilation * (kernel - 1) + 1 - stride, 0) // 2
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 0)):
        value = bias.expand(2, 6).clone()
        for ky in range(kernel):
            for kx in range(kernel):
                y, x = row * stride - before + ky * dilation, column * stride - before + kx * dilation
                if 0 <= y < size[0] and 0 <= x < size[1]:
                    value += image[:, :, y, x] @ weight[:, :, ky, kx].T
        torch.testing.assert_close(out[:, row, column], F.layer_norm(value, (6,), gain, offset), rtol=1e-10, atol=1e-11)


Operands = dict[str, Tensor]  # image, weight and perhaps bias, norm_weight, norm_bias


def make_operands(
    batch: int, in_channels: int, size: tuple[int, int], channels: int, kernel: int, kinds: str = "bwo"
) -> Operands:
    """Random operands; `kinds` says which of bias, norm weight and norm offset are there."""
    operands = {
        "image": torch.randn(batch, in_channels, *size),
        "weight": torch.randn(channels, in_channels, kernel, kernel),
    }
    names = {"b": "bias", "w": "norm_weight", "o": "norm_bias"}
    return operands | {name: torch.randn(channels) for kind, name in names.items() if kind in kinds}


def embed(operands: Operands, stride: int, dilation: int, padding: tuple[int, int, int, int], **more) -> Tensor:
    return ops.patch_embed(stride=stride, dilation=dilation, padding=padding, **({"bias": None} | operands), **more)


def both_ways(operands: Operands, gradient: Tensor | None, *settings, **more) -> dict[str, Tensor]:
    """Output, and gradients of all operands (of the sum, without `gradient`)."""
    leaves = {name: x.detach().requires_grad_() for name, x in operands.items()}
    out = embed(leaves, *settings, **more)
    gradient = torch.ones_like(out) if gradient is None else gradient.to(out.dtype)
    return {"output": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), gradient), strict=True)
    )


def assert_as_exact(operands: Operands, *settings, backend: str | None = None, tiny: float = 0.0, **more) -> None:
    """Forward and all gradients: error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64."""
    with use_backend("reference"):
        wide = {name: x.double() for name, x in operands.items()}
        like = embed(wide, *settings, **more)
        gradient = torch.randn(like.shape, device=like.device).to(operands["image"].dtype)
        theirs = both_ways(operands, gradient, *settings, **more)
        exact = both_ways(wide, gradient, *settings, **more)
    if backend is None:
        ours = both_ways(operands, gradient, *settings, **more)
    else:
        with use_backend(backend):
            ours = both_ways(operands, gradient, *settings, **more)
    for name, want in exact.items():
        got, other = ours[name], theirs[name]
        assert got.dtype == other.dtype and got.is_contiguous(), name
        assert_accurate(name, got, other, want, tiny)


# batch, Cin, size, C, K, stride, dilation, padding, kinds: one and several vectors of channels, cut vectors and blocks
# of tokens, every usual stride and others, rows of pixels outside the image, patches of padding alone
SHAPES = [
    (2, 3, (32, 60), 32, 4, 4, 1, (0, 0, 0, 0), "bwo"),
    (1, 3, (35, 50), 24, 7, 4, 1, (1, 2, 3, 0), "bwo"),
    (2, 1, (33, 65), 88, 8, 8, 2, (5, 5, 4, 3), "bw"),
    (1, 5, (40, 61), 7, 3, 2, 3, (2, 0, 2, 5), "wo"),
    (1, 3, (64, 64), 17, 5, 16, 5, (2, 2, 2, 2), "b"),
    (1, 2, (20, 20), 1, 1, 3, 1, (0, 0, 0, 0), ""),
    (1, 3, (20, 31), 48, 6, 5, 1, (9, 30, 7, 40), "bwo"),
    (1, 1, (30, 20), 100, 9, 1, 2, (0, 0, 0, 0), "bwo"),
    (3, 3, (4, 4), 16, 2, 2, 1, (0, 0, 0, 0), "bwo"),
]


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[3:7])))
def test_every_isa(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    batch, in_channels, size, channels, kernel, stride, dilation, padding, kinds = shape
    torch.manual_seed(1)
    operands = make_operands(batch, in_channels, size, channels, kernel, kinds)
    assert_as_exact({name: x.to(dtype) for name, x in operands.items()}, stride, dilation, padding)


@needs_extension
def test_layouts() -> None:
    """Images and gradients of any layout give the same, bit for bit."""
    torch.manual_seed(2)
    operands = make_operands(2, 3, (20, 24), 24, 4)
    settings = (4, 1, (1, 1, 0, 2))
    gradient = torch.randn(2, 24, 5, 6).permute(0, 2, 3, 1)  # [2, 5, 6, 24], channels far apart
    want = both_ways(operands, gradient.contiguous(), *settings)
    layouts = {
        "channels_last": operands["image"].to(memory_format=torch.channels_last),
        "columns first": operands["image"].transpose(2, 3).contiguous().transpose(2, 3),
        "part of another": torch.randn(2, 5, 40, 24)[:, 1:4, ::2].copy_(operands["image"]),
    }
    weight = operands["weight"].to(memory_format=torch.channels_last)
    for name, image in layouts.items():
        got = both_ways(operands | {"image": image, "weight": weight}, gradient, *settings)
        assert all(torch.equal(got[key], want[key]) for key in want), name
    expanded = both_ways(operands, torch.ones(()).expand(2, 5, 6, 24), *settings)
    assert all(torch.isfinite(x).all() for x in expanded.values())


@needs_extension
def test_large_mean() -> None:
    """The mean of a token's channels is far from zero, compared with their deviation."""
    torch.manual_seed(3)
    operands = make_operands(1, 3, (16, 16), 40, 4)
    operands["weight"] *= 1e-3
    operands["bias"] = 100.0 + 1e-3 * torch.randn(40)
    assert_as_exact(operands, 4, 1, (0, 0, 0, 0))


@needs_extension
@pytest.mark.parametrize("kernel", [4, 7])  # the convolution is computed again, or its values are kept
def test_no_epsilon_and_equal_channels(kernel: int) -> None:
    """Tokens without variance are torch's: zeros with an epsilon, NaN without; no others are touched."""
    torch.manual_seed(4)
    operands = make_operands(1, 3, (8, 20), 24, kernel)
    operands["bias"].zero_()
    settings = (4, 1, (0, 3, 0, 3))
    assert_as_exact(operands, *settings, eps=0.0)
    operands["image"][..., 8:16] = 0.0
    assert_as_exact(operands, *settings, tiny=1e-3)
    out = embed(operands, 4, 1, (0, 0, 0, 0), eps=0.0)
    with use_backend("reference"):
        assert torch.equal(out.isnan(), embed(operands, 4, 1, (0, 0, 0, 0), eps=0.0).isnan())
    assert not out.isnan().all()


@needs_extension
@pytest.mark.parametrize("kernel", [4, 7])
def test_threads_agree(kernel: int) -> None:
    """Bit for bit, all gradients."""
    torch.manual_seed(5)
    operands = make_operands(3, 3, (64, 128), 48, kernel)
    before, results = torch.get_num_threads(), []
    gradient = torch.randn(3, 16, 32, 48)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(both_ways(operands, gradient, 4, 1, (0, 3, 0, 3)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_extension
@pytest.mark.parametrize("wanted", [("image",), ("weight",), ("norm_bias",), ("image", "bias")])
def test_only_what_is_wanted(wanted: tuple[str, ...]) -> None:
    """Gradients of some operands, the others frozen, and the values in which they may be kept."""
    torch.manual_seed(6)
    operands = make_operands(2, 3, (16, 16), 24, 6)
    gradient = torch.randn(2, 4, 4, 24)
    everything = both_ways(operands, gradient, 4, 1, (0, 2, 0, 2))
    leaves = {name: x.requires_grad_() if name in wanted else x for name, x in operands.items()}
    out = embed(leaves, 4, 1, (0, 2, 0, 2))
    for name, got in zip(wanted, torch.autograd.grad(out, [leaves[name] for name in wanted], gradient), strict=True):
        assert torch.equal(got, everything[name])


@pytest.mark.parametrize(("kinds", "wanted"), [("bwo", (True, True)), ("w", (False, True)), ("", (True, False))])
def test_opcheck(kinds: str, wanted: tuple[bool, bool]) -> None:
    """The forward op where nothing but parameters, or nothing, is differentiated; the backward op of what is wanted."""
    operands = make_operands(2, 3, (12, 16), 6, 6, kinds)
    full = [operands.get(name) for name in ("image", "weight", "bias", "norm_weight", "norm_bias")]
    full = [x if x is None else x.requires_grad_(wanted[1]) for x in full]
    forward = (*full, 4, 1, [1, 1, 1, 1], 1e-5, torch.float32, torch.float32)
    keep = "w" in kinds
    out, values = torch.ops.asvit_fast.patch_embed(*forward, keep)
    gradients = [x is not None and want for x, want in zip(full, (wanted[0], *(wanted[1],) * 4), strict=True)]
    backward = (torch.randn_like(out), None, values.detach(), *forward, keep, gradients)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    dynamic = ("test_aot_dispatch_dynamic",) if kinds == "bwo" else ()
    torch.library.opcheck(torch.ops.asvit_fast.patch_embed.default, (*forward, keep), test_utils=checks + dynamic)
    dynamic = DYNAMIC_DOUBLE_BACKWARD if kinds == "bwo" else ()
    torch.library.opcheck(torch.ops.asvit_fast.patch_embed_gradients.default, backward, test_utils=checks + dynamic)


def test_gradients_of_gradients() -> None:
    torch.manual_seed(7)
    operands = make_operands(1, 2, (6, 5), 3, 2)
    leaves = [x.double().requires_grad_() for x in operands.values()]

    def f(*tensors: Tensor) -> Tensor:
        return embed(dict(zip(operands, tensors, strict=True)), 2, 2, (1, 0, 0, 1))

    for backend in ("reference", "cpu"):
        if backend == "cpu" and af.backends.available("patch_embed", "cpu", "cpu") is not None:
            continue
        with use_backend(backend):
            torch.autograd.gradcheck(f, leaves)
            torch.autograd.gradgradcheck(f, leaves)
            torch.autograd.gradgradcheck(lambda x: f(x, *(leaf.detach() for leaf in leaves[1:])), leaves[:1])


def test_transforms() -> None:
    torch.manual_seed(8)
    operands = {name: x.double() for name, x in make_operands(1, 2, (6, 5), 3, 2).items()}
    image = operands["image"]

    def f(x: Tensor) -> Tensor:
        return embed(operands | {"image": x}, 2, 2, (1, 0, 0, 1)).square().sum()

    leaf = image.clone().requires_grad_()
    gradient = torch.func.grad(f)(image)
    torch.testing.assert_close(torch.autograd.grad(f(leaf), leaf)[0], gradient)
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(torch.stack([image, 2 * image]))[0], gradient)
    torch.testing.assert_close(torch.func.jacrev(f)(image), gradient)
    tangent = torch.randn_like(image)
    torch.testing.assert_close(torch.func.jvp(f, (image,), (tangent,))[1], (gradient * tangent).sum())
    second = torch.func.jvp(torch.func.grad(f), (image,), (tangent,))[1]
    (again,) = torch.autograd.grad((torch.autograd.grad(f(leaf), leaf, create_graph=True)[0] * tangent).sum(), leaf)
    torch.testing.assert_close(again, second)


@needs_extension
@pytest.mark.parametrize("kernel", [4, 7])
@pytest.mark.parametrize("mode", ["compile", "checkpoint", "export", "vmap"])
def test_inside(mode: str, kernel: int) -> None:
    """torch.compile(fullgraph), activation checkpointing, torch.export and vmap give the same."""
    torch.manual_seed(9)
    module = OverlapPatchEmbed(kernel, 24)
    image = torch.randn(2, 3, 20, 24)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = image.clone().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])]

    backend = "inductor" if kernel == 4 else "aot_eager"  # slow and thorough, or fast
    torch.compiler.reset()
    changed: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "compile": lambda: torch.compile(module, fullgraph=True, dynamic=True, backend=backend),
        "checkpoint": lambda: lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False),
        "export": lambda: torch.export.export(module, (image,)).module(),
        "vmap": lambda: lambda x: torch.vmap(module)(x.unsqueeze(1)).squeeze(1),
    }
    function = changed[mode]()
    if mode == "export":  # with parameters of its own
        torch.testing.assert_close(function(image), module(image))
        return
    for got, want in zip(run(function), run(module), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_extension
def test_backend_of_a_compiled_function() -> None:
    """It is chosen when the op runs, forward and backward on their own."""
    torch.manual_seed(11)
    operands = make_operands(2, 3, (16, 20), 24, 7)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(image: Tensor, weight: Tensor) -> Tensor:
        return embed(operands | {"image": image, "weight": weight}, 4, 1, (1, 2, 1, 2))

    want = both_ways(operands, None, 4, 1, (1, 2, 1, 2))
    for forward, backward in (("cpu", "reference"), ("reference", "cpu"), ("reference", "reference")):
        weight = operands["weight"].clone().requires_grad_()
        with use_backend("cpu"):
            function(operands["image"], weight)  # traced with the fused op
        with use_backend(forward):
            out = function(operands["image"], weight)
        with use_backend(backward):
            (gradient,) = torch.autograd.grad(out.sum(), weight)
        torch.testing.assert_close(out, want["output"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, want["weight"], rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [True, False])
def test_autocast(dtype: torch.dtype, norm: bool) -> None:
    """The types that torch's convolution and LayerNorm have under autocast; parameters keep theirs."""
    torch.manual_seed(10)
    module, image = OverlapPatchEmbed(4, 16, norm=norm), torch.randn(1, 3, 16, 16)
    for low in (image, image.to(dtype)):
        with torch.autocast("cpu", dtype):
            out = module(low)
            with use_backend("reference"):
                want = module(low)
        assert out.dtype == want.dtype
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
        gradients = torch.autograd.grad(out.float().square().sum(), list(module.parameters()))
        assert {gradient.dtype for gradient in gradients} == {torch.float32}


@needs_extension
def test_compiled_autocast() -> None:
    module, image = OverlapPatchEmbed(4, 16), torch.randn(1, 3, 16, 16)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(image)
        torch.testing.assert_close(out, module(image))
    out.float().sum().backward()
    assert module.proj.weight.grad is not None


def test_mixed_norm() -> None:
    """LayerNorm's parameters may be wider than the rest, as in torch on a CPU."""
    operands = make_operands(1, 3, (8, 8), 6, 4)
    low = {name: x if name.startswith("norm") else x.bfloat16() for name, x in operands.items()}
    got = both_ways(low, None, 4, 1, (0, 0, 0, 0))
    assert got["output"].dtype == got["weight"].dtype == torch.bfloat16 and got["norm_weight"].dtype == torch.float32


def test_empty_and_elsewhere() -> None:
    operands = make_operands(0, 3, (8, 8), 6, 4)
    assert both_ways(operands, None, 4, 1, (0, 0, 0, 0))["weight"].eq(0).all()
    meta = {name: x.to("meta") for name, x in make_operands(2, 3, (8, 9), 6, 4).items()}
    assert embed(meta, 4, 1, (0, 3, 0, 0)).shape == (2, 2, 3, 6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": torch.zeros(1, 4, 8, 8)}, "same Cin"),
        ({"image": torch.zeros(3, 8, 8)}, r"must be \[B, Cin, H, W\]"),
        ({"weight": torch.zeros(2, 3, 4, 5)}, "square"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"padding": (0, -1, 0, 0)}, "padding must be at least 0, got -1"),
        ({"dilation": 3}, "patches of 10 pixels .* do not fit an image of 8 x 8"),
        ({"image": torch.zeros(1, 3, 8, 8).double()}, "image is torch.float64 and weight torch.float32"),
        ({"bias": torch.zeros(3)}, r"must be \[2\]"),
        ({"norm_weight": torch.zeros(3)}, r"must be \[2\]"),
        ({"norm_bias": torch.zeros(2)}, "norm_bias without norm_weight"),
    ],
)
def test_rejects(change: dict, says: str) -> None:
    arguments = {"image": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(2, 3, 4, 4), "bias": None}
    arguments |= {"stride": 4, "dilation": 1, "padding": (0, 0, 0, 0)}
    with pytest.raises(ValueError, match=says):
        ops.patch_embed(**(arguments | change))


def test_forced_backend_gives_its_reason() -> None:
    operands = make_operands(1, 3, (8, 8), 6, 4)
    with use_backend("cuda"), pytest.raises(af.InputError, match="cannot run patch_embed"):
        embed(operands, 4, 1, (0, 0, 0, 0))
