"""Losses for diversity: their formulas, their gradients, and every way in which a network may run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck

from asvit_fast.errors import InputError
from asvit_fast.models import create_model
from asvit_fast.ops.windows import split_heads
from asvit_fast.training import regularizers
from asvit_fast.training.regularizers import (
    Regularization,
    attention_maps,
    attention_similarity,
    conditional_orthogonality,
    cross_layer_contrast,
    parse_regularizers,
    patch_similarity,
)

TOPOLOGY = "4,2,2,2|2,1,2,1|3,1,2,2|2,1,2,1|8,8"
ALL = {"patch": 0.5, "contrast": 0.5, "attention": 0.1, "weight": 0.1}
TESTS = Path(__file__).parent


def images(batch: int = 2, seed: int = 1, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))  # [B, 3, H, W]


def network(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model(TOPOLOGY, img_size=32, num_classes=3, **options)


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


def gradients(model: nn.Module, run: nn.Module, weights: dict[str, float] = ALL, **autocast: object) -> list[Tensor]:
    """Gradients of the regularization alone, for every parameter."""
    regularization = Regularization(model, weights)
    with torch.autocast("cpu", **(autocast or {"enabled": False})), regularization:
        run(images())
    regularization.loss().backward()
    regularization.remove()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item() + 1e-9)


# ---------------------------------------------------------------------- options


def test_parse() -> None:
    assert parse_regularizers("") == {}
    assert parse_regularizers("patch:0.1, attention:1e-4") == {"patch": 0.1, "attention": 1e-4}


@pytest.mark.parametrize("text", ["tokens:1", "patch", "patch:x", "patch:-1", "patch:nan", "patch:1,patch:2"])
def test_parse_names_the_mistake(text: str) -> None:
    with pytest.raises(InputError, match=r"regularizers: .*(patch|tokens)"):
        parse_regularizers(text)


# ---------------------------------------------------------------------- formulas


def cosines(vectors: Tensor) -> Tensor:
    return F.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1)  # [B, n, n]


def test_patch_similarity_is_the_mean_cosine_of_pairs() -> None:
    tokens = torch.randn(3, 7, 5, dtype=torch.float64)
    pairs = ~torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(patch_similarity(tokens), cosines(tokens)[:, pairs].mean())
    assert patch_similarity(tokens[:, :1].expand(-1, 7, -1)).item() == pytest.approx(1)


def test_contrast_is_its_formula() -> None:
    first, last = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    cosine = F.cosine_similarity(first[:, :, None], last[:, None], dim=-1)  # [B, n, n]
    own = cosine.diagonal(dim1=1, dim2=2)  # [B, n]
    others = (cosine.sum(2) - own) / 6
    expected = -(own.exp() / (own.exp() + others.exp())).log().mean()
    torch.testing.assert_close(cross_layer_contrast(first, last), expected)


def test_conditional_orthogonality_is_the_spread_of_the_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 4, 6, dtype=torch.float64)
    values = torch.linalg.svdvals(weight).square()  # [3, 4]
    estimate = conditional_orthogonality(weight)
    exact = (values[:, 0] - values[:, -1]).square().mean()
    assert 0.5 * exact < estimate <= exact
    monkeypatch.setattr(regularizers, "ITERATIONS", 500)
    torch.testing.assert_close(conditional_orthogonality(weight), exact)
    orthogonal = torch.linalg.qr(torch.randn(3, 6, 4, dtype=torch.float64)).Q.mT
    assert conditional_orthogonality(orthogonal).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("function", [patch_similarity, attention_similarity, conditional_orthogonality])
def test_gradients_of_the_terms(function) -> None:
    shape = (2, 3, 4, 5) if function is attention_similarity else (2, 3, 5)
    assert gradcheck(function, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_gradient_of_contrast() -> None:
    tokens = [torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(cross_layer_contrast, tokens)


@pytest.mark.parametrize(("size", "window"), [((8, 8), None), ((7, 6), None), ((3, 3), (7, 7))])
@pytest.mark.parametrize("attn_scale", [False, True])
def test_attention_maps_are_those_of_the_network(size: tuple[int, int], window, attn_scale: bool) -> None:
    """Rows of the window that each image shows, by the definition of attention on that window alone."""
    attention = network(attn_scale=attn_scale).stages[0].blocks[0].attn.double()
    attention.window = window
    if attn_scale:
        nn.init.normal_(attention.attn_scale)
    qkv = attention.qkv(torch.randn(5, *size, 8, dtype=torch.float64))  # [B, H, W, 3 C]
    maps = attention_maps(qkv, attention)  # [B, heads, queries, n]
    rows, columns = window or (-(-size[0] // 2), -(-size[1] // 2))
    rows, columns = min(rows, size[0]), min(columns, size[1])
    across = size[1] // columns
    for image in range(5):
        down, right = divmod(image % (size[0] // rows * across), across)
        part = qkv[image : image + 1, down * rows : (down + 1) * rows, right * columns : (right + 1) * columns]
        q, k, _ = split_heads(part.reshape(1, 1, rows * columns, -1), attention.num_heads)  # [1, 1, heads, n, d]
        expected = (q @ k.mT * attention.head_dim**-0.5).softmax(-1)[0, 0]  # [heads, n, n]
        if attn_scale:
            factor = attention.attn_scale[:, None, None]
            expected = (1 + factor) * expected - factor / (rows * columns)
        chosen = torch.linspace(0, rows * columns - 1, min(regularizers.QUERIES, rows * columns)).long()
        torch.testing.assert_close(maps[image], expected[:, chosen])


def test_attention_maps_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(qk_norm=True)
    attention = model.blocks[0].attn
    x = torch.randn(2, 9, 24)
    qkv = attention.qkv(x)
    v = qkv.reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)[2]
    assert attention_maps(qkv, attention).shape == (2, 3, 9, 9)
    out = (attention_maps(qkv, attention) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(out), attention(x))


# ---------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("make", [network, vit])
def test_gradients_of_a_whole_network(make) -> None:
    """Against finite differences along the gradient, in float64."""
    model = make().double()
    regularization = Regularization(model, ALL)
    x = images().double()

    def value() -> Tensor:
        with regularization:
            model(x)
        return regularization.loss()

    value().backward()
    assert regularization.terms.keys() == ALL.keys()
    assert all(math.isfinite(term) for term in regularization.terms.values())
    found = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
    step = 1e-5 / math.sqrt(sum(gradient.square().sum().item() for gradient in found.values()))
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, gradient in found.items():
                parameter += sign * step * gradient
            values.append(value().item())
    expected = step * sum(gradient.square().sum().item() for gradient in found.values())
    assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=1e-4)


def test_each_term_is_what_it_says() -> None:
    model = vit()
    seen = {}
    for name, module in {"first": model.blocks[0], "last": model.blocks[-1], "qkv": model.blocks[0].attn.qkv}.items():
        module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
    regularization = Regularization(model, ALL)
    with regularization:
        model(images())
    loss = regularization.loss()
    expected = {
        "patch": patch_similarity(seen["last"][:, 1:]),
        "contrast": cross_layer_contrast(seen["first"][:, 1:], seen["last"][:, 1:]),
        "attention": attention_similarity(attention_maps(seen["qkv"], model.blocks[0].attn)),
        "weight": torch.stack(
            [conditional_orthogonality(block.attn.qkv.weight.unflatten(0, (3, -1))) for block in model.blocks]
        ).mean(),
    }
    assert regularization.terms == pytest.approx({name: term.item() for name, term in expected.items()}, rel=1e-5)
    assert loss.item() == pytest.approx(sum(ALL[name] * term.item() for name, term in expected.items()), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_training_on_a_term_alone_lowers_it(name: str) -> None:
    model = network()
    regularization = Regularization(model, {name: 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(15):
        with regularization:
            model(images())
        loss = regularization.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.01 * abs(values[0])


def test_nothing_is_left_behind() -> None:
    model = network()
    before = list(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    regularization = Regularization(model, ALL)
    model(images())  # outside of `with`: nothing is noted
    with pytest.raises(InputError, match="was not seen"):
        regularization.loss()
    assert list(model.state_dict()) == before
    regularization.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("make", [network, vit])
def test_checkpointed_activations(make) -> None:
    model = make()
    expected = gradients(model, model)
    model.set_grad_checkpointing(True)
    model.train()
    assert_close(gradients(model, model), expected)


def test_reentrant_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    model.set_grad_checkpointing(True)
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    with pytest.raises(InputError, match="no gradient reaches"):
        gradients(model, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "checkpointing"),
    [(network, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((network, False), (vit, True)))],
)
def test_compiled(make, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model = make()
    expected = gradients(model, model)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    found = gradients(model, compiled)
    assert_close(found, expected)
    compiled(images())  # neither hooks nor flag are frozen into the graph
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_one_graph_with_and_one_without() -> None:
    """As training does it: passes with the terms, validation without; nothing is compiled again."""
    torch._dynamo.reset()
    model = vit()
    regularization = Regularization(model, ALL)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    for _ in range(3):
        with regularization:
            compiled(images())
        regularization.loss().backward()
        with torch.no_grad():
            compiled(images())
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_compiled_before() -> None:
    torch._dynamo.reset()
    model = vit()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    regularization = Regularization(model, {"patch": 1.0})
    with regularization:
        compiled(images())
    with pytest.raises(InputError, match="before the first compiled pass"):
        regularization.loss()
    torch._dynamo.reset()


def test_mixed_precision() -> None:
    model = network()
    expected = gradients(model, model)
    found = gradients(model, model, dtype=torch.bfloat16)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    total = torch.cat([(one - other).flatten() for one, other in zip(found, expected, strict=True)]).norm()
    assert total < 0.05 * torch.cat([gradient.flatten() for gradient in expected]).norm()


@pytest.mark.slow
def test_on_two_processes() -> None:
    """The mean over the ranks, as of any other loss, under DDP and FSDP2."""
    model = network()
    for rank in range(2):
        regularization = Regularization(model, ALL)
        with regularization:
            logits = model(images(seed=rank))  # [B, classes]
        (logits.square().mean() / 2 + regularization.loss() / 2).backward()
        regularization.remove()
    expected = pytest.approx([parameter.grad.norm().item() for parameter in model.parameters()], rel=1e-4, abs=1e-7)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS.parent)}
    program = [*command, str(TESTS / "regularizer_program.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected]


def test_networks_that_have_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="Sequential is neither"):
        Regularization(nn.Sequential(nn.Linear(2, 2)), ALL)
    with pytest.raises(InputError, match="neither an As-ViT nor a vision transformer"):
        Regularization(timm.create_model("swin_tiny_patch4_window7_224"), ALL)
    with pytest.raises(InputError, match="two blocks in a stage"):
        Regularization(create_model("4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8", img_size=32, num_classes=3), ALL)
    with pytest.raises(InputError, match="two heads in a stage"):
        Regularization(vit(num_heads=1), {"attention": 1.0})
