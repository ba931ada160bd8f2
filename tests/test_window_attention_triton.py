"""window_attention's Triton kernels: in Triton's interpreter against float64, compiled for GPUs that need not be there,
and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton_versions
from accuracy import TINY, assert_accurate

from asvit_fast import ops
from asvit_fast.backends import use_backend

pytest.importorskip("triton")

# H, W, heads, head_dim, window, shift; a window is one tile in 16 bits up to 64 tokens and head_dim 32
SINGLE_TILE = [
    (7, 7, 3, 32, (7, 7), (0, 0)),
    (9, 14, 2, 5, (7, 7), (3, 3)),
    (16, 8, 2, 8, (8, 8), (0, 0)),  # exact tiles: nothing is masked
    (3, 3, 2, 1, (2, 2), (1, 1)),
    (5, 4, 1, 22, (3, 2), (1, 0)),
    (5, 5, 1, 8, (7, 7), (3, 3)),
    (2, 3, 2, 3, (1, 1), (0, 0)),
    (4, 5, 1, 45, (4, 5), (0, 0)),
    (9, 3, 1, 70, (9, 3), (0, 2)),
]
TILED = [
    (17, 5, 1, 13, (17, 5), (4, 2)),  # a tail of 32
    (10, 13, 1, 45, (10, 10), (0, 0)),
    (8, 16, 1, 8, (8, 16), (0, 0)),  # exact blocks
    (10, 10, 1, 8, (10, 10), (0, 0)),  # a tail as large as a block
    (13, 5, 2, 4, (13, 5), (0, 0)),  # a tail of one token
    (14, 10, 1, 29, (14, 14), (5, 3)),
    (1, 70, 1, 16, (1, 70), (0, 7)),
]
# H, W, heads, head_dim, window, shift, layout: padding and mask as the layouts define them, and AttnScale
LAYOUTS = [
    (7, 9, 2, 8, (4, 4), (2, 2), "timm"),
    (7, 9, 2, 3, (4, 4), (2, 2), "torchvision"),
    (8, 6, 1, 5, (4, 3), (2, 1), "timm"),  # windows divide the map
    (2, 5, 1, 4, (4, 4), (3, 1), "timm"),  # rolled by more than its height
    (5, 4, 1, 22, (7, 7), (0, 3), "torchvision"),
    (5, 5, 1, 4, (3, 3), (0, 0), "timm"),
    (8, 6, 2, 4, (4, 3), (0, 0), "grid"),
    (7, 5, 1, 8, (4, 3), (1, 2), "masked"),
    (8, 8, 1, 8, (8, 8), (0, 0), "masked"),
    (9, 7, 1, 4, (9, 9), (4, 2), "timm"),
    (7, 11, 1, 4, (7, 10), (3, 4), "torchvision"),
    (9, 20, 1, 4, (9, 10), (0, 0), "grid"),
    (10, 9, 1, 4, (10, 10), (0, 5), "masked"),
    (5, 14, 1, 33, (5, 14), (0, 0), "masked"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def both_ways(qkv, heads, window, shift, gradient, layout="masked", kv_window=None, factor=None, **tensors) -> dict:
    """Output, and gradients of qkv or of q, k and v, and of bias, padding, attn_scale and scale where they are; a
    number as the scale is `factor`."""
    maps = {"qkv": qkv} if isinstance(qkv, torch.Tensor) else dict(zip("qkv", qkv, strict=True))
    maps = {name: tensor.detach().requires_grad_() for name, tensor in maps.items()}
    others = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    given = maps["qkv"] if "qkv" in maps else tuple(maps.values())
    scale = others.get("scale", factor)
    out = ops.window_attention(
        given, heads, window, shift, layout=layout, kv_window=kv_window, **(others | {"scale": scale})
    )
    inputs = maps | others
    gradients = torch.autograd.grad(
        out, list(inputs.values()), gradient.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return {"output": out.detach()} | dict(zip(inputs, gradients, strict=True))


def compare(
    qkv, heads, window, shift, bias=None, layout="masked", padding=None, attn_scale=None, scale=None, kv_window=None,
    factor=None,
) -> None:  # fmt: skip
    """Forward and all gradients: error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64."""
    maps = [qkv] if isinstance(qkv, torch.Tensor) else list(qkv)
    first = maps[0]
    shape = (*first.shape[:-1], first.shape[-1] // (1 if maps[1:] else 3))
    gradient = torch.randn(shape, dtype=torch.float64, device=first.device).to(first.dtype)
    tensors = {"bias": bias, "padding": padding, "attn_scale": attn_scale, "scale": scale}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def run(dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        cast = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
        given = [x.to(dtype or x.dtype) for x in maps]
        given = given if maps[1:] else given[0]
        return both_ways(given, heads, window, shift, gradient, layout, kv_window, factor, **cast)

    with use_backend("triton"):
        ours = run(None)
    with use_backend("reference"):
        theirs, exact = run(first.dtype), run(torch.float64)
    for name, got in ours.items():
        want = exact[name]
        assert got.is_contiguous(), name
        assert got.dtype == (tensors[name].dtype if name in tensors else first.dtype), name
        sums = first[..., 0].numel() if name in ("attn_scale", "scale") else 1  # over all tokens: they may cancel
        what = f"{name} of {tuple(first.shape)} {first.dtype} {layout} {list(tensors)}"
        assert_accurate(what, got, theirs[name], want, TINY[got.dtype] * sums**0.5)


ALL = slice(None)  # cases of a list


def check_shapes(cases: list, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """With and without a bias, memory poisoned."""
    for number, (height, width, heads, head_dim, window, shift) in enumerate(cases):
        for dtype in dtypes:
            for biased in (False, True):
                if device.type == "cpu" and biased == bool(number % 2) ^ (dtype == torch.float32):
                    continue  # the interpreter is slow
                qkv = torch.randn(1, height, width, 3 * heads * head_dim, device=device).to(dtype)
                tokens = window[0] * window[1]
                bias = torch.randn(heads, tokens, tokens, device=device) if biased else None
                compare(qkv, heads, window, shift, bias)


def check_layouts(device: torch.device, chosen: slice = ALL) -> None:
    """Every layout, with everything that can be given at once and with less; padding and AttnScale of other dtypes."""
    for number, (height, width, heads, head_dim, window, shift, layout) in list(enumerate(LAYOUTS))[chosen]:
        for half in (False, True):
            for everything in (False, True):
                if device.type == "cpu" and everything != (half == bool(number % 2)):
                    continue  # the interpreter is slow
                dtype = (torch.float16, torch.bfloat16)[number // 2 % 2] if half else torch.float32
                channels, tokens = 3 * heads * head_dim, window[0] * window[1]
                tensors = {}
                if layout in ("timm", "torchvision"):
                    tensors["padding"] = torch.randn(channels, device=device).to(dtype if everything else torch.float32)
                if everything or layout == "masked":
                    tensors["attn_scale"] = torch.randn(heads, device=device)
                if everything:
                    tensors["bias"] = torch.randn(heads, tokens, tokens, device=device)
                qkv = torch.randn(1, height, width, channels, device=device).to(dtype)
                compare(qkv, heads, window, shift, layout=layout, **tensors)


def check_details(device: torch.device) -> None:
    """Details that shapes do not show: layouts, empty maps, bias types, large scores, infinite bias, determinism."""
    qkv = torch.randn(2, 24, 6, 8, device=device).permute(0, 2, 3, 1)  # channels far apart
    compare(qkv, 2, (3, 4), (1, 2), torch.randn(2, 12, 12, device=device).to(torch.bfloat16))
    with use_backend("triton"):
        found = both_ways(qkv, 2, (3, 4), (1, 2), torch.ones((), device=device).expand(2, 6, 8, 8))
        assert torch.isfinite(found["qkv"]).all()
    for size in (7, 9):
        for dtype, factor in ((torch.float32, 5.0), (torch.bfloat16, 30.0)):
            qkv = torch.randn(1, size, size, 24, device=device)
            qkv[..., :16] *= factor
            compare(qkv.to(dtype), 1, (size, size), (0, 0), None)
    compare(torch.zeros(1, 9, 9, 12, device=device), 1, (9, 9), (3, 3))
    for dtype in (torch.float32, torch.bfloat16):  # w = -1: nothing but the mean is left, and nothing divides by 0
        qkv, ones = torch.randn(1, 5, 4, 24, device=device).to(dtype), torch.ones(1, device=device)
        compare(qkv, 1, (3, 3), (1, 0), attn_scale=-ones)
    # -100 is not -inf: a bias may outweigh it
    bias, padding = 80.0 * torch.randn(1, 9, 9, device=device), torch.randn(24, device=device)
    compare(torch.randn(1, 5, 4, 24, device=device), 1, (3, 3), (1, 1), bias, "torchvision", padding)
    padding = torch.full((24,), torch.nan, device=device)  # a token that windows without padding do not look at
    with use_backend("triton"):
        out = ops.window_attention(qkv, 1, (5, 3), (0, 0), layout="timm", padding=padding)
    assert out.isnan().any(-1).flatten(1).tolist() == [[column == 3 for column in range(4)] * 5]
    for size in (4, 9):  # one tile, and blocks of which some have no key left for a query
        bias = torch.randn(1, size**2, size**2, device=device)
        bias = bias.masked_fill(torch.rand_like(bias) < 0.4, -torch.inf)
        bias[:, :, 0] = 0.0
        bias[:, 2, : size**2 - 1], bias[:, 2, -1] = -torch.inf, 0.0
        qkv = torch.randn(1, size, size, 12, device=device)
        compare(qkv, 1, (size, size), (0, 0), bias)
        bias[0, 3] = -torch.inf
        with use_backend("triton"):
            out = ops.window_attention(qkv, 1, (size, size), (0, 0), bias)
        assert out.isnan().all(-1).flatten().tolist() == [token == 3 for token in range(size**2)]
        given = {"bias": torch.randn(1, size**2, size**2, device=device), "layout": "timm"}
        given |= {"padding": torch.randn(12, device=device), "attn_scale": torch.randn(1, device=device)}
        arguments = (qkv[:, 1:], 1, (size, size), (1, 0), out[:, 1:].nan_to_num())
        with use_backend("triton"):
            first, second = both_ways(*arguments, **given), both_ways(*arguments, **given)
        assert all(torch.equal(first[name], second[name]) for name in first)
    check_nothing(device)
    check_fake(device)


def check_scores(device: torch.device) -> None:
    """Scales of any sign, scores near 10^4, and numbers about rows that another backend's forward pass hands on."""
    for dtype in (torch.bfloat16, torch.float32):  # one tile, and blocks
        qkv, bias = torch.randn(1, 5, 6, 48, device=device).to(dtype), torch.randn(2, 16, 16, device=device)
        for factor in (-0.7, 0.0, 1e-30):
            compare(qkv, 2, (4, 4), (1, 2), factor=factor)  # masked: -inf times 0 is NaN, times -1 infinite
            compare(qkv, 2, (4, 4), (1, 2), bias, "timm", factor=factor)
        compare(qkv, 2, (4, 4), (1, 2), layout="torchvision")
    qkv = torch.randn(1, 9, 9, 24, device=device)
    qkv[..., :16] *= 0.1
    qkv[..., 0] = qkv[..., 8] = 168.0  # scores of 168^2 / 8^0.5, about 10^4, that differ by little
    for bias in (None, torch.randn(1, 81, 81, device=device)):
        compare(qkv, 1, (9, 9), (2, 0), bias)
        compare(qkv[:, :7, :7].to(torch.bfloat16), 1, (7, 7), (2, 0), None if bias is None else bias[:, :49, :49])
    if device.type == "cpu":
        check_backends(torch.randn(1, 9, 9, 24))


def check_backends(qkv: torch.Tensor) -> None:
    """A forward pass in plain PyTorch or in C++, then the kernels' backward pass, and the reverse."""
    gradient = torch.randn(1, 9, 9, 8)
    absent, sides = (None, None, None), ([9, 9], [2, 0], [9, 9])
    settings = (qkv, None, None, torch.randn(1, 81, 81), *absent, 1, *sides, 0.35, "masked", 0.0)
    wanted = [True, False, False, True, False, False, False]
    results = {}
    for backend in ("reference", "cpu", "triton"):
        with use_backend(backend):
            results[backend] = torch.ops.asvit_fast.window_attention(*settings)
    for ours, other in (("triton", "reference"), ("triton", "cpu"), ("cpu", "triton")):
        with use_backend(ours):
            same, mixed = (
                torch.ops.asvit_fast.window_attention_gradients(gradient, *results[name], *settings, wanted)
                for name in (ours, other)
            )
        torch.testing.assert_close(same, mixed)


def check_nothing(device: torch.device) -> None:
    """An empty batch: empty outputs, and zeros for the gradients of what all windows share."""
    from asvit_fast.kernels.window_attention import window_attention, window_attention_backward

    for dtype, statistics in ((torch.bfloat16, None), (torch.float32, torch.empty(2, 0, 6, 8, 2, device=device))):
        qkv, ones = torch.empty(0, 6, 8, 24, dtype=dtype, device=device), torch.ones(2, device=device)
        parameters = (torch.ones(2, 25, 25, device=device), torch.ones(24, device=device), ones, ones)
        arguments = (qkv, None, None, *parameters, 2, [5, 5], [1, 0], [], 1.0, "timm")
        out = window_attention(*arguments, statistics)
        assert out.shape == (0, 6, 8, 8)
        found = window_attention_backward(out, out, statistics, *arguments, [True, False, False] + [True] * 4)
        assert found[0].shape == qkv.shape and found[1] is None and found[2] is None
        for gradient, tensor in zip(found[3:], parameters, strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


def check_fake(device: torch.device) -> None:
    """Results are what the fake ops promise, also those of gradients that nobody wants."""
    qkv, padding = torch.randn(1, 3, 4, 6, device=device).to(torch.bfloat16), torch.randn(6, device=device)
    bias, ones = torch.randn(1, 4, 4, device=device), torch.ones(1, device=device)
    tests = ("test_schema", "test_faketensor")
    for maps, needs_grad in (((qkv, None, None), [True, False, False]), (qkv.chunk(3, -1), [True, False, True])):
        settings = (*maps, bias, padding, ones, ones, 1, [2, 2], [1, 0], [], 1.0, "timm", 0.0)
        with use_backend("triton"):
            torch.library.opcheck(torch.ops.asvit_fast.window_attention, settings, test_utils=tests)
            out, statistics = torch.ops.asvit_fast.window_attention(*settings)
            backward = (out, out, statistics, *settings, [*needs_grad, False, True, False, True])
            torch.library.opcheck(torch.ops.asvit_fast.window_attention_gradients, backward, test_utils=tests)


def check_many_windows(device: torch.device) -> None:
    """Several windows per program, the last of them with fewer; more than 65,535 on a GPU."""
    from asvit_fast.kernels import launch

    if device.type == "cpu":
        launch.PROGRAMS = 3
    compare(torch.randn(3, 10, 8, 24, device=device), 2, (4, 4), (1, 2), torch.randn(2, 16, 16, device=device))
    compare(torch.randn(3, 5, 26, 12, device=device), 2, (5, 13), (2, 0), torch.randn(2, 65, 65, device=device))
    more = {"padding": torch.randn(12, device=device), "attn_scale": torch.randn(1, device=device)}
    qkv = torch.randn(2, 9, 8, 12, device=device).to(torch.bfloat16)
    compare(qkv, 1, (4, 4), (1, 2), torch.randn(1, 16, 16, device=device), "timm", **more)
    if device.type == "cuda":
        compare(torch.randn(1, 300, 440, 12, device=device), 2, (2, 1), (0, 0), torch.randn(2, 2, 2, device=device))


def check_scale(device: torch.device) -> None:
    """The gradient of a scale per head: a sum over all scores that cancels, so that nothing in it may be rounded."""
    for window, scaled, dtype in (
        ((4, 4), False, torch.float16), ((9, 10), False, torch.float16), ((9, 10), True, torch.bfloat16)
    ):  # fmt: skip
        size, heads, head_dim, tokens = [2 * window[0], window[1]], 3, 8, window[0] * window[1]
        tensors = {"bias": torch.randn(heads, tokens, tokens, device=device)}
        tensors |= {"attn_scale": torch.randn(heads, device=device)} if scaled else {}
        tensors["scale"] = 0.2 + torch.rand(heads, device=device)
        qkv = torch.randn(1, *size, 3 * heads * head_dim, device=device).to(dtype)
        gradient = torch.randn(1, *size, heads * head_dim, device=device).to(dtype)
        with use_backend("triton"):
            ours = both_ways(qkv, heads, window, (0, 0), gradient, **tensors)["scale"]  # [heads]
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
        with use_backend("reference"):
            exact = both_ways(qkv.double(), heads, window, (0, 0), gradient, **tensors)["scale"]
        error = (ours - exact).norm().item() / exact.norm().item()
        assert error < 1e-4, f"{window} {dtype} {list(tensors)}: {error}"


def check_chunks(device: torch.device) -> None:
    """All blocks of keys of a window in one program, and in two, of which the last has fewer; everything given."""
    from asvit_fast.kernels import launch, tile_table

    before = launch.PROGRAMS
    try:
        for launch.PROGRAMS in (1, 3):
            tile_table.forget()  # with the launches that were decided before
            for dtype in (torch.float32, torch.bfloat16):
                qkv, bias = torch.randn(1, 10, 19, 12, device=device), torch.randn(1, 200, 200, device=device)
                more = {"padding": torch.randn(12, device=device), "attn_scale": torch.randn(1, device=device)}
                more |= {"scale": torch.rand(1, device=device)}
                compare(qkv.to(dtype), 1, (10, 20), (3, 0), bias, "timm", **more)
            qkv = torch.rand(1, 9, 9, 12, device=device)
            qkv[..., :4] += 6.0
            qkv[..., 4:8] -= 14.0  # scores below -100: to a key that is not there, of score 0, the weight is infinite
            compare(qkv, 1, (9, 9), (0, 0))
    finally:
        launch.PROGRAMS = before
        tile_table.forget()


def check(name: str, device: torch.device, case: int | None = None, dtype: torch.dtype | None = None) -> None:
    """One of the checks, or one case of it."""
    one = ALL if case is None else slice(case, case + 1)
    dtypes = DTYPES if dtype is None else [dtype]
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    {
        "single_tile": lambda: check_shapes(SINGLE_TILE[one], device, dtypes),
        "tiled": lambda: check_shapes(TILED[one], device, dtypes),
        "layouts": lambda: check_layouts(device, one),
        "chunks": lambda: check_chunks(device),
        "details": lambda: check_details(device),
        "scores": lambda: check_scores(device),
        "many": lambda: check_many_windows(device),
        "scale": lambda: check_scale(device),
    }[name]()


QUICK = ("scale",)
SLOW = ("chunks", "single_tile", "tiled", "layouts", "scores", "details", "many")


@triton_versions.interpreter
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_interpreted(name, root):
    triton_versions.run_interpreted(__name__, name, root)


ON_A_GPU = [  # one by one, as most of the time is the compiler's
    *(("single_tile", case, dtype) for case in range(len(SINGLE_TILE)) for dtype in DTYPES),
    *(("tiled", case, dtype) for case in range(len(TILED)) for dtype in DTYPES),
    *(("layouts", case, None) for case in range(len(LAYOUTS))),
    *((name, None, None) for name in (*QUICK, *SLOW) if name not in ("single_tile", "tiled", "layouts")),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case", "dtype"), ON_A_GPU)
def test_on_a_gpu(name, case, dtype, poison_empty):
    check(name, torch.device("cuda"), case, dtype)


# --------------------------------------------------------------------------- compiled

SHIFTED = {"shift": True}
PADDED = {"shift": True, "size": 30, "layout": "timm", "padding": True}
LEAN = {"bias": False}


def run(side, head_dim, dtype, shift=False, size=0, layout="masked", bias=True, padding=False, attn_scale=False):
    """A forward and a backward pass with 4 heads."""
    size, channels, tokens = size or 4 * side, 12 * head_dim, side * side
    sizes = {"bias": (4, tokens, tokens), "padding": (channels,), "attn_scale": (4,)}
    wanted = {"bias": bias, "padding": padding, "attn_scale": attn_scale}
    qkv = torch.empty(2, size, size, channels, dtype=dtype)
    tensors = {
        name: torch.empty(sizes[name], dtype=torch.float32 if name == "bias" else dtype)
        for name, want in wanted.items()
        if want
    }
    shift = (side // 2, side // 2) if shift else (0, 0)
    both_ways(qkv, 4, (side, side), shift, qkv.new_empty(2, size, size, channels // 3), layout, **tensors)


@pytest.mark.parametrize(
    ("side", "head_dim", "dtype", "capability", "settings"),
    [
        (7, 32, torch.bfloat16, 90, SHIFTED),
        (7, 8, torch.bfloat16, 90, LEAN),
        (7, 32, torch.bfloat16, 90, PADDED),
        (14, 8, torch.bfloat16, 90, SHIFTED | {"attn_scale": True}),
        (14, 32, torch.float16, 90, PADDED),
        (28, 45, torch.bfloat16, 90, LEAN),
        (28, 45, torch.float32, 90, {}),
        (7, 16, torch.float32, 90, {"layout": "grid"}),
        (7, 32, torch.bfloat16, 80, SHIFTED),
        (28, 8, torch.bfloat16, 80, LEAN),
        (7, 32, torch.bfloat16, 100, SHIFTED),
        (28, 8, torch.bfloat16, 100, LEAN),
    ],
)
def test_compiled(side, head_dim, dtype, capability, settings):
    """For GPUs that need not be there: everything fits, and no register is spilled."""
    from triton_cases import launches_of

    launches = launches_of(lambda: run(side, head_dim, dtype, **settings), capability)
    assert len(launches) >= 2
    for launch in launches:
        report = launch.compile(capability)
        assert report.shared_bytes <= 99 * 1024, report  # of the smallest GPUs
        triton_versions.assert_no_spills(report)


@pytest.mark.parametrize("head_dim", [4, 8, 16, 22, 32, 45])
def test_scores_are_multiplied_in_whole_steps(head_dim):
    """bfloat16 is multiplied 16 channels at a time: of 8, Triton 3.8 would take each twice."""
    from triton_cases import launches_of

    for launch in launches_of(lambda: run(7, head_dim, torch.float32), 90):
        shape = launch.constants["SHAPE"]
        assert shape.score_precision == "tf32x3" or min(shape.parts) >= 16, shape
        assert shape.score_precision == "bf16x6" or min(shape.parts) < 16 or len(shape.parts) > 1, shape


def test_no_value_is_lost():
    """ptxas 12.8 has lost the place of a matrix here, so that an H100 read outside of shared memory."""
    from triton_cases import launches_of

    for launch in launches_of(lambda: run(9, 33, torch.bfloat16, attn_scale=True), 90):
        assert launch.compile(90).stack_pointer_uses == 0, launch.name
