"""patch_embed's Triton kernels: in Triton's interpreter against float64, compiled for GPUs that need not be there, and
on a GPU if there is one."""

from __future__ import annotations

import itertools
import tempfile

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
    (1, 2, (21, 37), 70, 18, 16, 1, (0, 1, 1, 0), "bwo"),  # rows of a patch that are longer than a block of pixels
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


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 x with ten bits behind the leading one, as float64."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(mantissa * 2**11), exponent - 11)


def check_tf32(device: torch.device) -> None:
    """Where torch's convolutions may use TF32, as is its default, errors are those of operands rounded to it: cutting
    bits off would double them."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    operands = on(device, 2, 3, (33, 25), 24, 8, "b")
    settings = (4, 1, (2, 2, 2, 2))
    with use_backend("reference"):
        wide = {name: x.double() for name, x in operands.items()}
        gradient = torch.randn_like(embed(wide, *settings)).float()
        exact = both_ways(wide, gradient, *settings)
        rounded = {name: rounded_to_tf32(x) if name != "bias" else x.double() for name, x in operands.items()}
        usual = both_ways(rounded, rounded_to_tf32(gradient), *settings)
    with use_backend("triton"):
        found = both_ways(operands, gradient, *settings)
    for name in ("output", "weight"):
        error, common = (found[name] - exact[name]).norm(), (usual[name] - exact[name]).norm()
        assert 0.5 * common < error < 1.25 * common, f"{name}: {error} against {common}"


def check_far_pixels(device: torch.device) -> None:
    """More than 2^31 elements between images, and between the channels of one."""
    with tempfile.NamedTemporaryFile() as file:  # of which only the pages that are touched exist
        elements = 2**32 + 2**12
        file.truncate(2 * elements)
        memory = torch.from_file(file.name, shared=True, size=elements, dtype=torch.float16)
        if device.type == "cuda":
            memory = torch.zeros(elements, dtype=torch.float16, device=device)
        operands, settings = on(device, 3, 3, (9, 10), 16, 4, dtype=torch.float16), (3, 1, (1, 0, 2, 1))
        with use_backend("triton"):
            want = both_ways(operands, None, *settings)
            for strides in (
                (2**31 + 64, 100, 10, 1),
                (3 * 2**29, 100, 10, 1),
                (900, 2**31 - 2**8, 10, 1),
                (400, 2**31, 11, 1),
            ):
                image = memory.as_strided((3, 3, 9, 10), strides)
                image.copy_(operands["image"])
                got = both_ways(operands | {"image": image}, None, *settings)
                assert all(torch.equal(got[name], want[name]) for name in want), strides
                image.zero_()


def check(name: str, device: torch.device) -> None:
    """One of the checks, with memory poisoned."""
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # torch would use TF32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    globals()[f"check_{name}"](device)


CHECKS = pytest.mark.parametrize("name", ["shapes", "details", "many_tokens", "autocast", "tf32", "far_pixels"])


@triton_versions.interpreter
@CHECKS
def test_interpreted(name, root):
    triton_versions.run_interpreted(__name__, name, root)


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_shape_on_a_gpu(case, poison_empty, repeatable_float32):
    torch.manual_seed(0)
    check_shapes(torch.device("cuda"), slice(case, case + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CHECKS.args[1] if name != "shapes"])
def test_on_a_gpu(name, poison_empty, repeatable_float32):
    check(name, torch.device("cuda"))


# --------------------------------------------------------------------------- decided on the host


def test_pixels_that_are_loaded_at_once():
    """All of them are in the patch and in the image, or none is."""
    from asvit_fast.kernels.patch_embed import Problem

    found = set()
    sizes = itertools.product((16, 18, 21), (1, 2, 4, 6, 7, 8), (1, 2, 3, 4, 8, 16), (0, 1, 2, 4), (1, 2))
    for width, kernel, stride, left, dilation in sizes:
        padding = (left, 3, 0, 1)
        if width + left + 3 < dilation * (kernel - 1) + 1:
            continue
        problem = Problem(
            (1, 3, 16, width), (3 * 16 * width, 16 * width, width, 1), (8, 3, kernel, kernel), stride, dilation,
            padding, torch.bfloat16, torch.device("cpu"), False, False, False, "tf32x3",
        )  # fmt: skip
        vector = problem.vector
        found.add(vector)
        assert vector == 1 or (dilation == 1 and kernel % vector == 0)
        for column, group in itertools.product(range(problem.output_size[2]), range(0, kernel, vector)):
            first = column * stride - left + group
            assert first % vector == 0
            assert len({0 <= first + pixel < width for pixel in range(vector)}) == 1
    assert found == {1, 2, 4, 8}


def test_division_by_multiplication():
    from asvit_fast.kernels.patch_embed import reciprocal

    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 2**31, (200,), generator=random).tolist()
    for divisor in (*range(1, 100), 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, *drawn):
        factor, shift = reciprocal(divisor)
        assert 2**31 < factor < 2**32  # of one type for Triton, and 32 bits hold it
        last = (2**31 - 1) // divisor * divisor
        for number in {0, divisor - 1, divisor, min(divisor + 1, 2**31 - 1), last - 1, last, 2**31 - 1, *drawn[:20]}:
            assert (2 * number * factor >> 32) >> shift == number // divisor


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


def weight_gradient(kernel: int, channels: int, dtype: torch.dtype, precision: str = "tf32"):
    """Its launch on Hopper, for a batch of images."""
    from triton_cases import launches_of

    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        operands, pad = on(torch.device("cpu"), 2, 3, (64, 64), channels, kernel, dtype=dtype), (kernel - 4) // 2
        launches = launches_of(lambda: both_ways(operands, None, 4, 1, (pad, pad, pad, pad)), 90)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    return next(launch for launch in launches if launch.name == "patch_embed_weight_gradient_kernel")


@pytest.mark.skipif(triton_versions.OLD, reason="counts are those of the newest compiler")
@pytest.mark.parametrize(("kernel", "channels", "limit"), [(8, 88, 220), (7, 96, 330), (4, 96, 190)])
def test_instructions_of_the_weight_gradient(kernel, channels, limit):
    """Of a warp, for 32 tokens and 64 pixels: gathering them must not cost more than memory does. Four blocks fit on
    a multiprocessor, three where pixels cannot be loaded in pairs."""
    from kernel_inspection import disassemble, inner_loop

    launch = weight_gradient(kernel, channels, torch.bfloat16)
    assert (launch.constants["BLOCK_M"], launch.constants["BLOCK_K"], launch.options["num_warps"]) == (32, 64, 4)
    report = launch.compile(90)
    loop = inner_loop(disassemble(report.cubin)[launch.name])
    assert loop.instructions <= limit
    assert report.registers <= (128 if kernel % 2 == 0 else 160) and report.spilled_bytes == 0


def test_products_of_float32():
    """One where torch's convolutions may use TF32, else three; nothing else of torch's settings matters."""
    from kernel_inspection import disassemble, inner_loop

    counts = {}
    for precision in ("tf32", "ieee"):
        launch = weight_gradient(8, 88, torch.float32, precision)
        body = disassemble(launch.compile(90).cubin)[launch.name]
        counts[precision] = inner_loop(body).mix["tensor"]
    assert counts["ieee"] == 3 * counts["tf32"] > 0
    half = [weight_gradient(8, 88, torch.bfloat16, precision) for precision in ("tf32", "ieee")]
    assert half[0] == half[1]  # not compiled twice
