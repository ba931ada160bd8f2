"""Fewer tokens from the same weights: As-ViT against its reference, timm's networks against those that timm itself
builds for the coarse grid."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from timm.utils import ModelEmaV3
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.backends import use_backend
from asvit_fast.nn import OverlapPatchEmbed
from asvit_fast.nn import patch_embed as patch_embed_module
from asvit_fast.training import set_token_reduction, token_reduction

TINY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
SPLIT = "{},8,2,1|4,4,2,1|3,2,2,1|2,1,2,1|8,8"  # more splits than the coarse grids have tokens
ODD = (52, 64)


def asvit(topology: str = TINY, img_size: Any = 64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return af.create_model(topology, img_size=img_size, num_classes=5, pos_embed="absolute", **options).double()


def vit(size: Any = (32, 40), patch: Any = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, **options}
    return VisionTransformer(size, patch, **shape).double().eval()


def swin(kind: Any, size: tuple[int, int] = (64, 128), window: Any = 8) -> nn.Module:
    torch.manual_seed(0)
    model = kind(size, 2, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 4), num_classes=5, window_size=window)
    for parameter in model.parameters():  # no position bias and no residual branch is negligible
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


# --------------------------------------------------------------------------- the first projection


def expected_tokens(image: Tensor, proj: nn.Conv2d, reduction: int, strides: tuple[int, int]) -> Tensor:
    """Tokens [B, C, Ho, Wo] by the formulas of arXiv 2202.11921, pixel by pixel of a patch."""
    far = 200
    canvas = F.pad(image, (far,) * 4)  # zeros wherever a patch may reach
    lines = []  # the pixels of every token, along both axes: [K, Ho] and [K, Wo]
    for kernel, stride, size in zip(proj.kernel_size, strides, image.shape[2:], strict=True):
        stride *= reduction
        dilation = round((reduction - 1) * kernel / (kernel - 1)) + 1
        before = max(dilation * (kernel - 1) + 1 - stride, 0) // 2
        first = far - before + stride * torch.arange(math.ceil(size / stride))
        lines.append(first + dilation * torch.arange(kernel).unsqueeze(1))
    tokens: Any = proj.bias[None, :, None, None]
    for i, rows in enumerate(lines[0]):
        for j, columns in enumerate(lines[1]):
            pixels = canvas[:, :, rows][..., columns]  # [B, Cin, Ho, Wo]
            tokens = tokens + torch.einsum("bihw,oi->bohw", pixels, proj.weight[:, :, i, j])
    return tokens


@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 48), (52, 64), (33, 47)])
class TestFirstProjection:
    @pytest.mark.parametrize("kernel", [4, 5, 6, 7, 8])
    def test_ours(self, kernel: int, size: tuple[int, int], reduction: int) -> None:
        torch.manual_seed(0)
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        ours = OverlapPatchEmbed(kernel, 8, norm=False, dtype=torch.float64)
        ours.set_token_reduction(reduction)
        wanted = expected_tokens(image, ours.proj, reduction, (4, 4))
        torch.testing.assert_close(ours(image).permute(0, 3, 1, 2), wanted)

    @pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (7, 7), (16, 16), (3, 5), (4, 6)])
    def test_timm(self, kernel: tuple[int, int], size: tuple[int, int], reduction: int) -> None:
        model = vit(size, kernel, dynamic_img_pad=True)
        set_token_reduction(model, reduction)
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        found = model.patch_embed(image).reshape(2, -1, 16)  # [B, Ho*Wo, C]
        wanted = expected_tokens(image, model.patch_embed.proj, reduction, kernel).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, wanted)


# kernel: total zeros along a side that the stride divides, for strides 4, 8, 16
ZEROS = {4: (0, 0, 0), 5: (1, 1, 5), 6: (2, 3, 10), 7: (3, 5, 15), 8: (4, 7, 13)}


@pytest.mark.parametrize("kernel", ZEROS)
def test_zeros_around_the_image(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(patch_embed_module, "patch_embed", lambda *args: seen.append(args[3:6]))
    embed = OverlapPatchEmbed(kernel, 8)
    for reduction in (1, 2, 4):
        embed.set_token_reduction(reduction)
        embed(torch.zeros(1, 3, 64, 64))
    spans = [dilation * (kernel - 1) + 1 for _, dilation, _ in seen]
    assert [stride for stride, _, _ in seen] == [4, 8, 16]
    for span, (stride, _, padding), total in zip(spans, seen, ZEROS[kernel], strict=True):
        assert total == max(span - stride, 0)
        assert padding == (total // 2, total - total // 2) * 2


# --------------------------------------------------------------------------- As-ViT


@pytest.mark.parametrize(
    ("topology", "size", "reduction"),
    [
        *((TINY, ODD, reduction) for reduction in (1, 2, 4)),
        *((SPLIT.format(8), (224, 224), reduction) for reduction in (1, 2, 4)),
        (SPLIT.format(7), (36, 100), 4),
        (TINY, (33, 47), 2),
    ],
)
def test_asvit_equals_its_reference(topology: str, size: tuple[int, int], reduction: int) -> None:
    model = asvit(topology, img_size=64)
    set_token_reduction(model, reduction)
    images = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
    inputs = [images, *model.parameters()]

    def outputs() -> list[Tensor]:
        logits = model(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), inputs)]

    found = outputs()
    with use_backend("reference"):
        wanted = outputs()
    grid = [math.ceil(side / (4 * reduction)) for side in size]
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
    assert [list(map.shape[2:]) for map in maps] == [[math.ceil(side / 2**i) for side in grid] for i in range(4)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_position_embedding_follows_the_grid() -> None:
    """A smooth embedding stays the same picture; all of it gets a gradient."""
    model = asvit()
    ramp = torch.linspace(0, 1, 16, dtype=torch.float64)
    model.pos_embed.data.copy_(ramp[None, :, None, None].expand_as(model.pos_embed))
    image = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    for reduction in (2, 4):
        set_token_reduction(model, reduction)
        added = model.embed(image) - model.patch_embed(image)  # [1, h, w, C]
        want = F.avg_pool2d(ramp.expand(1, 16, 16).mT, reduction)[0]  # rows of tokens that became one
        torch.testing.assert_close(added[0, 1:-1, 1:-1, 0], want[1:-1, 1:-1], rtol=1e-2, atol=1e-2)
        gradient = torch.autograd.grad(added.sum(), model.pos_embed)[0]
        torch.testing.assert_close(gradient.sum(), torch.tensor(added.numel() * 1.0).double(), rtol=1e-4, atol=0)
        assert (gradient != 0).all()


def test_full_tokens_again_are_exactly_as_before() -> None:
    model = asvit()
    images = torch.randn(2, 3, *ODD, dtype=torch.float64)
    state, before = copy.deepcopy(model.state_dict()), model(images)
    for reduction in (4, 2, 1):
        set_token_reduction(model, reduction)
        assert token_reduction(model) == reduction
    assert torch.equal(model(images), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------- timm's networks against timm's own


def dense(weight: Tensor, reduction: int) -> Tensor:
    """A dilated kernel [C, Cin, K, K] written out on [C, Cin, K*r, K*r]."""
    kernel = weight.shape[2]
    step = round((reduction - 1) * kernel / (kernel - 1)) + 1
    out = weight.new_zeros(*weight.shape[:2], kernel * reduction, kernel * reduction)
    out[:, :, : step * (kernel - 1) + 1 : step, : step * (kernel - 1) + 1 : step] = weight
    return out


def agree(ours: nn.Module, native: nn.Module, size: tuple[int, int]) -> None:
    """Outputs, and the gradients of parameters that both have in the same shape."""
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found, wanted = ours(images), native(images)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    same = dict(native.named_parameters())
    shared = [name for name, parameter in ours.named_parameters() if parameter.shape == same[name].shape]
    assert len(shared) > len(same) // 2
    for name in shared:
        torch.testing.assert_close(ours.get_parameter(name).grad, same[name].grad, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("reduction", [2, 4])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"class_token": False}])
def test_vision_transformer_is_the_one_with_larger_patches(options: dict[str, Any], reduction: int) -> None:
    if options.get("class_token") is False:
        options = {**options, "global_pool": "avg"}
    ours = vit(**options)
    native = vit(patch=4 * reduction, dynamic_img_pad=True, dynamic_img_size=True, **options)
    native.patch_embed.strict_img_size = False
    weights = ours.state_dict()
    weights["patch_embed.proj.weight"] = dense(weights["patch_embed.proj.weight"], reduction)
    prefix = 0 if ours.no_embed_class else ours.num_prefix_tokens
    grid = native.patch_embed.grid_size = tuple(math.ceil(side / (4 * reduction)) for side in (32, 40))
    positions = resample_abs_pos_embed(ours.pos_embed.data, list(grid), [8, 10], prefix)
    native.pos_embed = nn.Parameter(positions)
    native.load_state_dict({**weights, "pos_embed": positions})
    set_token_reduction(ours, reduction)
    agree(ours, native, (32, 40))


# older versions build their own masks and windows for maps that are larger by a row
VERSION = tuple(map(int, timm.__version__.split(".")[:3]))
ODD_MAPS = pytest.mark.skipif(VERSION < (1, 0, 31), reason="needs maps that windows and merging divide")


@pytest.mark.parametrize("reduction", [2, 4])
@pytest.mark.parametrize(
    ("size", "window"),
    [((64, 128), 8), ((64, 128), (4, 8)), *(pytest.param(ODD, w, marks=ODD_MAPS) for w in (7, 8))],
)
@pytest.mark.parametrize("kind", [SwinTransformer, SwinTransformerV2])
def test_swin_is_the_one_with_larger_patches(kind: Any, size: tuple[int, int], window: Any, reduction: int) -> None:
    """timm shrinks the windows of a network that it builds for small maps, and leaves their shift out; the position
    biases of a smaller window are the middle of a table."""
    ours = swin(kind, size, window)
    patch = 2 * reduction
    padded = tuple(math.ceil(side / patch) * patch for side in size)
    shape: Any = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "num_classes": 5, "window_size": window}
    if kind is SwinTransformerV2:
        shape["pretrained_window_sizes"] = [block.attn.window_size for block in (s.blocks[0] for s in ours.layers)]
    native = kind(padded, patch, **shape).double().eval()
    weights = ours.state_dict()
    weights["patch_embed.proj.weight"] = dense(weights["patch_embed.proj.weight"], reduction)
    for name, block in native.named_modules():
        table = f"{name}.relative_position_bias_table"
        if table in weights:
            full, small = ours.get_submodule(name).window_size, block.window_size
            rows, columns = (slice(a - b, a + b - 1) for a, b in zip(full, small, strict=True))
            weights[table] = weights[table].unflatten(0, (2 * full[0] - 1, -1))[rows, columns].flatten(0, 1)
    native.load_state_dict(weights)
    set_token_reduction(ours, reduction)
    native.patch_embed.strict_img_size, native.patch_embed.dynamic_img_pad = False, True
    agree(ours, native, size)


TIMM = {
    "vit": vit,
    "vit dynamic": lambda: vit(dynamic_img_size=True),
    "deit distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=(64, 96), depth=2, num_classes=5
    ),
    "eva": lambda: timm.create_model(
        "vit_small_patch16_dinov3", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5
    ),
    "swin": lambda: swin(SwinTransformer),
    "swin7": lambda: swin(SwinTransformer, window=7),
    "swin2": lambda: swin(SwinTransformerV2),
    "swin any size": lambda: SwinTransformer(
        64, 2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), strict_img_size=False
    ),
    "swin always": lambda: SwinTransformer(64, 2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), always_partition=True),
}


@pytest.mark.parametrize("name", TIMM)
def test_full_tokens_of_timm_again(name: str) -> None:
    """Coarse ones run and differ, full ones are those before to the last bit, in the network and in every copy."""
    torch.manual_seed(0)
    model = TIMM[name]().double().eval()
    images = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    attributes = {key: dict(vars(module)) for key, module in model.named_modules()}
    state, buffers = copy.deepcopy(model.state_dict()), copy.deepcopy(dict(model.named_buffers()))
    before = model(images)
    for reduction in (4, 2):
        set_token_reduction(model, reduction)
        coarse = model(images)
        assert coarse.isfinite().all() and not torch.allclose(coarse, before)
        assert model.state_dict().keys() == state.keys()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert token_reduction(other) == reduction
            assert torch.equal(other(images), coarse)
            set_token_reduction(other, 1)
            assert torch.equal(other(images), before)
    set_token_reduction(model, 1)
    assert torch.equal(model(images), before)
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") or k == "_with_full_tokens"}
        assert plain == {k: v for k, v in attributes[key].items() if not k.startswith("_")}


def test_images_of_other_sizes() -> None:
    """A Swin that takes any size keeps doing so; one that does not still says so."""
    model = TIMM["swin any size"]().eval()
    set_token_reduction(model, 4)
    assert model(torch.randn(1, 3, 90, 150)).isfinite().all()
    strict = swin(SwinTransformer)
    set_token_reduction(strict, 2)
    with pytest.raises(AssertionError, match="doesn't match model"):
        strict(torch.randn(1, 3, 64, 64).double())


def test_windows_that_never_shrink() -> None:
    model = TIMM["swin always"]()
    blocks = [block for stage in model.layers for block in stage.blocks]
    before = [(block.window_size, block.shift_size) for block in blocks]
    set_token_reduction(model, 4)
    assert [(block.window_size, block.shift_size) for block in blocks] == before


@needs_kernels
@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
@pytest.mark.parametrize("kind", [SwinTransformer, SwinTransformerV2])
def test_accelerated_networks(kind: Any) -> None:
    """Before or after ``accelerate``, in either order of going back."""
    model = swin(kind)
    images = torch.randn(1, 3, 64, 128, dtype=torch.float64)
    plain = {}
    for reduction in (1, 2, 4):
        set_token_reduction(model, reduction)
        plain[reduction] = model(images)
    assert af.accelerate(model).swapped
    for reduction in (4, 1, 2):
        set_token_reduction(model, reduction)
        torch.testing.assert_close(model(images), plain[reduction])
    af.restore(model)
    assert torch.equal(model(images), plain[2])
    set_token_reduction(model, 1)
    assert torch.equal(model(images), plain[1])


def test_wrappers() -> None:
    """Everything inside is found: torch.compile, an average of the weights, a model of one's own."""
    model = asvit()
    average = ModelEmaV3(model)
    both = nn.ModuleDict({"compiled": torch.compile(model), "average": average, "timm": vit()})
    set_token_reduction(both, 4)
    assert token_reduction(both) == token_reduction(average.module) == token_reduction(both["timm"]) == 4
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(average.module(images), model(images))
    average.update(model)
    set_token_reduction(average, 1)
    assert token_reduction(model) == 4
    with pytest.raises(af.InputError, match=r"differ in token reduction, \[1, 4\]"):
        token_reduction(both)


class TestRefusals:
    @staticmethod
    def one_pixel() -> nn.Module:
        return vit(8, 1)

    @staticmethod
    def overlapping() -> nn.Module:
        model = vit()
        model.patch_embed.proj.stride = (2, 2)
        return model

    @staticmethod
    def own_embedding() -> nn.Module:
        class Own(PatchEmbed):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

        return vit(embed_layer=Own)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            ("test_resnet", "the tokens of ResNet cannot be reduced: it has no patch_embed"),
            ("mixer_s32_224", "the tokens of MlpMixer cannot be reduced: its layers mix a fixed number of tokens"),
            ("beit_base_patch16_224", "of Beit cannot be reduced: its relative position biases belong to one grid"),
            ("cait_xxs24_224", "of Cait cannot be reduced: its position embedding belongs to one grid"),
            ("vit_relpos_small_patch16_224", "of VisionTransformerRelPos cannot be reduced: its relative position"),
            ("convit_tiny", "of ConVit cannot be reduced: it is not known to work on any grid but its own"),
            ("eva02_tiny_patch14_224", "of Eva cannot be reduced: its rotary position embedding belongs to one grid"),
            (one_pixel, "of VisionTransformer cannot be reduced: its patches of 1 x 1 pixels have nothing to dilate"),
            (overlapping, "of VisionTransformer cannot be reduced: its patches are not side by side"),
            (
                own_embedding,
                "of VisionTransformer cannot be reduced: its patch_embed is a Own, not a timm.layers.PatchEmbed",
            ),
        ],
    )
    def test_networks(self, make: Any, message: str) -> None:
        """The class and the reason, and nothing has changed in what could have been reduced."""
        if isinstance(make, str):
            with torch.device("meta"):
                model = timm.create_model(make)
        else:
            model = make()
        pair = nn.ModuleList([vit(), model]) if make != "test_resnet" else model
        for reduction in (1, 2):
            with pytest.raises(af.InputError, match=message):
                set_token_reduction(pair, reduction)
        with pytest.raises(af.InputError, match=message):
            token_reduction(pair)
        assert make == "test_resnet" or token_reduction(pair[0]) == 1

    @pytest.mark.parametrize("reduction", [0, 3, 8, 2.5, "2", None])
    def test_reductions(self, reduction: Any) -> None:
        for model in (asvit(), vit()):
            with pytest.raises(af.InputError, match="token reduction must be 1, 2 or 4 per side, got"):
                set_token_reduction(model, reduction)
