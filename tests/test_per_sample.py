"""Kernels of per-sample gradients against float64, and networks whose layers need no trying out."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from stacked import every_isa, needs_extension
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.models.asvit import Block
from asvit_fast.nn import Linear
from asvit_fast.scoring import contractions, ntk
from asvit_fast.scoring.per_sample import _probe

SEED = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
DTYPES = [torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# samples, numbers of a row
ROWS = [(1, 1), (4, 0), (0, 5), (5, 777), (16, 8192), (3, 100_003), (17, 9), (33, 20_000)]
# samples, tokens, inputs, outputs: narrow and wide, few tokens and more than are packed at a time, no whole vectors
WEIGHTS = [
    (1, 1, 1, 1), (3, 5, 7, 9), (2, 300, 70, 130), (5, 1, 300, 2), (4, 49, 130, 64), (2, 600, 32, 96), (2, 600, 96, 32),
    (16, 10, 65, 65), (2, 0, 3, 4), (0, 2, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (1100, 2, 3, 20),
]  # fmt: skip
NORMS = [(1, 1, 1), (3, 130, 7), (2, 1, 65), (2, 100, 64), (5, 9, 300), (2, 0, 8), (0, 3, 8)]


def gram_of(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().T


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------- the kernels


@needs_extension
@every_isa
@every_dtype
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_gram(shape: tuple[int, int], dtype: torch.dtype, isa: str, poison_empty: None) -> None:
    rows = random(*shape, dtype=dtype)
    found, exact = torch.ops.asvit_fast_C.gram(rows), gram_of(rows)
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * max(1.0, shape[1]))


@needs_extension
@every_isa
@every_dtype
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_weight_gram(shape: tuple[int, ...], dtype: torch.dtype, isa: str, poison_empty: None) -> None:
    samples, tokens, inputs, outputs = shape
    x, gradient = random(samples, tokens, inputs, dtype=dtype), random(samples, tokens, outputs, dtype=dtype) + 0.1
    found = torch.ops.asvit_fast_C.linear_weight_gram(x, gradient)
    torchs, exact = (
        gram_of(torch.einsum("bto,bti->boi", gradient.to(t), x.to(t)).flatten(1)) for t in (dtype, torch.float64)
    )
    assert torch.equal(found, found.T)
    assert_accurate("Gram matrix", found, torchs, exact, tiny=1e-13 if dtype == torch.float64 else 1e-7)


@needs_extension
@every_isa
@every_dtype
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_layer_norm_weight_rows(shape: tuple[int, ...], dtype: torch.dtype, isa: str, poison_empty: None) -> None:
    x, gradient = random(*shape, dtype=dtype) + 3, random(*shape, dtype=dtype).flip(2)
    mean, inverse_std = x.mean(2), (x.var(2, correction=0) + 1e-5).rsqrt()
    found = torch.ops.asvit_fast_C.layer_norm_weight_rows(x, mean, inverse_std, gradient)
    torchs, exact = (
        (gradient.to(t) * ((x.to(t) - mean.to(t)[:, :, None]) * inverse_std.to(t)[:, :, None])).sum(1)
        for t in (dtype, torch.float64)
    )
    assert found.dtype == dtype
    assert_accurate("gradients", found, torchs, exact)


@needs_extension
def test_threads_change_no_bit() -> None:
    x, gradient = random(7, 300, 100, dtype=torch.float32), random(7, 300, 200, dtype=torch.float32)
    mean, inverse_std = x.mean(2), x.std(2)

    def run() -> list[Tensor]:
        kernels = torch.ops.asvit_fast_C
        return [
            kernels.gram(x.flatten(1)),
            kernels.linear_weight_gram(x, gradient),
            kernels.linear_weight_gram(x[:, :9].contiguous(), gradient[:, :9].contiguous()),
            kernels.layer_norm_weight_rows(x, mean, inverse_std, x),
        ]

    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_extension
def test_errors_name_the_value() -> None:
    kernels, x = torch.ops.asvit_fast_C, torch.ones(2, 3, 4)
    for call, text in (
        (lambda: kernels.gram(x), r"rows must be contiguous with 2 axes, not \[2, 3, 4\]"),
        (lambda: kernels.gram(x[0].T), "contiguous"),
        (lambda: kernels.gram(x[0].half()), "float32 or float64"),
        (lambda: kernels.linear_weight_gram(x, x[:, :2].contiguous()), r"gradient must be .*not \[2, 2, 4\]"),
        (lambda: kernels.linear_weight_gram(x, x[0]), "gradient must have 3 axes"),
        (lambda: kernels.linear_weight_gram(x, x.double()), "gradient"),
        (lambda: kernels.layer_norm_weight_rows(x, x[..., 0], x[..., 0].contiguous(), x), "mean must be contiguous"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call()


@every_dtype
@pytest.mark.parametrize("with_kernels", [False, True])
def test_rules(dtype: torch.dtype, with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our kernels and without: of a LayerNorm over two axes, of a Linear between others, of tensors with gaps."""
    if not with_kernels:
        monkeypatch.setattr(contractions, "_has_kernel", lambda x: False)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 40), nn.LayerNorm((5, 8)), Linear(5, 30)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x.transpose(2, 3)).unflatten(3, (5, 8)))  # [B, 3, W, 5, 8]
            return self.last(x.transpose(3, 4)).square().flatten(1)

    torch.manual_seed(0)
    model, images = Network().to(dtype), torch.randn(4, 3, 6, 7, dtype=dtype)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(sample.sum(), parameters, retain_graph=True) for sample in model(images)]
    expected = gram_of(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    found = af.ntk_gram(model, images, parameters="all")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


class Affine(nn.Module):
    """F.linear with parameters of any shapes that it takes."""

    def __init__(self, weight: list[int], bias: list[int]) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.flatten(1, 2), self.weight, self.bias).square()


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
@pytest.mark.parametrize(("weight", "bias"), [([6], []), ([5, 6], []), ([5, 6], [1]), ([5, 6], [12, 5])])
def test_linear_of_unusual_parameters(weight: list[int], bias: list[int]) -> None:
    torch.manual_seed(0)
    model, images = Affine(weight, bias), torch.randn(3, 3, 4, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(model(x[None]).sum(), parameters) for x in images]
    expected = gram_of(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    found = af.ntk_gram(model, images, parameters="all")
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


class ChangedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(48, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).sin()
        y = self.last(hidden)
        hidden.mul_(3)
        return y.sin() + hidden


def test_inputs_that_change_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        af.ntk_gram(ChangedInPlace(), torch.randn(5, 3, 4, 4))


# --------------------------------------------------------------------------- networks of ours


@pytest.mark.parametrize(
    "options", [{}, {"pos_embed": "none"}, {"norm": "identity"}, {"attn_scale": True, "feat_scale": True}], ids=str
)
def test_our_layers_hold_samples_one_after_the_other(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not tried out would have been found to be so, and the numbers are the same to the bit."""
    torch.manual_seed(0)
    model = af.create_model(SEED, img_size=44, num_classes=3, **options).eval()
    images = torch.randn(4, 3, 44, 44)
    assert ntk._is_ours(model)
    parameters = {name: p for name, p in model.named_parameters() if "weight" in name}
    with torch.enable_grad():
        slow, rows = _probe(ntk.score_features(model), images, parameters, len(images))
    assert not slow and rows
    found = af.ntk_gram(model, images)
    monkeypatch.setattr(ntk, "_is_ours", lambda model: False)
    assert torch.equal(found, af.ntk_gram(model, images))


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(0)


def test_other_layers_are_tried_out() -> None:
    """In a network of ours, a layer of somebody else's may mix the samples."""
    torch.manual_seed(0)
    model, images = (
        af.create_model(SEED, img_size=32, num_classes=3, pos_embed="none").double(),
        torch.randn(3, 3, 32, 32).double(),
    )
    assert ntk._is_ours(model)
    model.stages[1].register_forward_hook(lambda module, args, output: output * 2)
    assert not ntk._is_ours(model)
    model = af.create_model(SEED, img_size=32, num_classes=3, pos_embed="none").double()
    model.stages.insert(1, Mixer())
    assert not ntk._is_ours(model)
    parameters = [p for name, p in model.named_parameters() if "weight" in name]
    rows = [
        torch.autograd.grad(f.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for f in model.score_features(images)
    ]
    expected = gram_of(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    with pytest.warns(UserWarning, match="sample by sample"):
        found = af.ntk_gram(model, images)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("change", ["class", "layer", "hook of all modules", "backward hook"])
def test_changed_layers_of_ours_are_tried_out(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced forward of a class, or a hook of all modules or of a backward pass, may mix samples."""
    model = af.create_model(SEED, img_size=32, num_classes=3, pos_embed="none")
    assert ntk._is_ours(model)
    if change == "class":
        original = Block.forward
        monkeypatch.setattr(Block, "forward", lambda self, x: original(self, x).flip(0))
    elif change == "layer":
        monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x.flip(0))
    elif change == "backward hook":
        model.stages[0].blocks[0].mlp.act.register_full_backward_hook(lambda module, given, out: None)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert not ntk._is_ours(model)
    if change == "hook of all modules":
        handle.remove()
