"""Code that is no package, as its repositories have it: what it becomes, outputs and gradients. ASVIT_FAST_SOURCES is
a folder with checkouts, each as owner/name."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from source_modules import OfSize, load
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.acceleration import FAMILIES
from asvit_fast.acceleration.replacement import Replacement

SOURCES = os.environ.get("ASVIT_FAST_SOURCES")
pytestmark = [needs_kernels, pytest.mark.skipif(not SOURCES, reason="set ASVIT_FAST_SOURCES to a folder of checkouts")]
OPTIONS: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
SIZED = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "num_classes": 5, **OPTIONS}
RESTORES = {"img_size": 16, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "mlp_ratio": 2}
RESTORES |= {"upscale": 2, "upsampler": "pixelshuffle"}


def source(repository: str, file: str) -> Any:
    path = Path(SOURCES or "") / repository / file
    if not path.is_file():
        pytest.skip(f"no checkout of {repository}")
    return load(path)


def images(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, *size, generator=generator) for size in sizes]


def shifted(repository: str, file: str, cosine: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = source(repository, file)
        options = {"window_msa": module.WindowMSAV2} if cosine else {}
        return OfSize(module.ShiftWindowMSA(8, 2, window_size=4, shift_size=2, **options))

    return make


def made(repository: str, file: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(source(repository, file), name)(**options)


MICROSOFT, MODELS = "microsoft/Swin-Transformer", "models/swin_transformer"
BACKBONE = {"embed_dim": 12, "out_indices": (0, 1), **OPTIONS}
VIDEO = {"pretrained": None, "patch_size": (2, 4, 4), "embed_dim": 12, **OPTIONS, "window_size": (2, 3, 3)}
OF_BACKBONE = {"FastBackboneBlock", "FastBackboneStage", "FastBackbonePatchMerging"}
OF_HAT = {"FastHybridAttentionBlock", "FastOverlappingCrossAttention", "FastHybridAttentionTransformer"}
OF_VIDEO = {"FastVideoSwinBlock", "FastVideoSwinStage", "FastVideoPatchMerging"}
MAPS = [torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1)) for size in ((8, 4), (9, 11), (4, 7))]
ATTENTION = "models/utils/attention.py"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Tensor], set[str]]] = {
    "Swin": (
        made(MICROSOFT, f"{MODELS}.py", "SwinTransformer", **SIZED),
        images((64, 64)),
        {"FastMicrosoftSwinBlock", "FastMicrosoftPatchMerging", "FastMicrosoftPatchEmbed"},
    ),
    "Swin V2": (
        made(MICROSOFT, f"{MODELS}_v2.py", "SwinTransformerV2", **SIZED),
        images((64, 64)),
        {"FastMicrosoftSwinV2Block", "FastMicrosoftPatchEmbed"},
    ),
    **{
        part: (
            made(f"SwinTransformer/Swin-Transformer-{name}", f"{part}/models/backbones/swin_transformer.py",
                 "SwinTransformer", **BACKBONE),
            images((64, 64), (44, 52)),
            OF_BACKBONE,
        )
        for part, name in (("mmdet", "Object-Detection"), ("mmseg", "Semantic-Segmentation"))
    },
    "Video Swin": (
        made("SwinTransformer/Video-Swin-Transformer", "mmaction/models/backbones/swin_transformer.py",
             "SwinTransformer3D", **VIDEO),
        images((4, 48, 24), (6, 44, 40)),
        OF_VIDEO,
    ),
    "SwinIR": (
        made("JingyunLiang/SwinIR", "models/network_swinir.py", "SwinIR", **RESTORES),
        images((16, 16), (22, 27)),
        {"FastSwinIRBlock"},
    ),
    "SwinFIR": (
        made("Zdafeng/SwinFIR", "swinfir/archs/swinfir_arch.py", "SwinFIR", **RESTORES),
        images((16, 16), (24, 20)),
        {"FastSwinIRBlock"},
    ),
    **{
        name: (made(repository, file, name, squeeze_factor=4, **RESTORES), images((16, 16), (24, 20)), OF_HAT)
        for name, repository, file in (
            ("HAT", "XPixelGroup/HAT", "hat/archs/hat_arch.py"),
            ("HATFIR", "Zdafeng/SwinFIR", "swinfir/archs/hatfir_arch.py"),
        )
    },
    "mmdetection": (
        shifted("open-mmlab/mmdetection", "mmdet/models/backbones/swin.py"), MAPS, {"FastShiftWindowMSA"}
    ),
    "mmsegmentation": (
        shifted("open-mmlab/mmsegmentation", "mmseg/models/backbones/swin.py"), MAPS, {"FastShiftWindowMSA"}
    ),
    "mmpretrain": (
        shifted("open-mmlab/mmpretrain", f"mmpretrain/{ATTENTION}"), MAPS, {"FastPretrainShiftWindowMSA"}
    ),
    "mmpretrain V2": (
        shifted("open-mmlab/mmpretrain", f"mmpretrain/{ATTENTION}", True), MAPS, {"FastPretrainShiftWindowMSAV2"}
    ),
}  # fmt: skip


def network(name: str) -> nn.Module:
    """With weights so large that attention is far from uniform."""
    if name in ("HAT", "HATFIR"):
        pytest.importorskip("einops")
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.add_((1.0 if "bias_table" in path else 0.1) * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_and_gradients(name):
    model = network(name)
    report = af.check_replacement(model, NETWORKS[name][1])
    fast = {decision.replacement for decision in report.swapped} - {"FastLinear", "FastMicrosoftMlp"}
    assert fast == NETWORKS[name][2] and report.unknown == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_but_rounding_in_float64(name):
    """Far below what a wrong mask, padding or order of channels would make."""
    model = network(name).double()
    model.eval()
    for x in NETWORKS[name][1]:
        with torch.no_grad():
            expected = model(x.double())
            af.accelerate(model, strict=True)
            actual = model(x.double())
            af.restore(model)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_copied_and_pickled(name):
    model = network(name)
    model.eval()
    af.accelerate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    x = NETWORKS[name][1][-1]
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


def test_every_structure_is_met():
    met = set().union(*(fast for _, _, fast in NETWORKS.values())) | {"FastMicrosoftMlp"}
    known = {family.replacement_name for family in FAMILIES if family.by_structure}
    assert {name for name in known if "Authors" not in name} == met


def test_masks_that_nobody_needs_are_not_made(monkeypatch):
    """The masks of a shift are the source's business only where a block runs as its source."""
    for name, method in (("SwinIR", "calculate_mask"), ("HAT", "calculate_mask")):
        model = network(name)
        af.accelerate(model)
        owners = [module for module in model.modules() if hasattr(type(module), method)]
        for kind in {type(module).source for module in owners}:
            monkeypatch.setattr(kind, method, forbidden(getattr(kind, method)))
        with torch.no_grad():
            model(NETWORKS[name][1][1])


def forbidden(method: Any) -> Any:
    """As `method` to those who look at it, but not to be called."""

    def refuse(*args: Any) -> None:
        raise RuntimeError("a mask was made")

    refuse.__module__, refuse.__qualname__ = method.__module__, method.__qualname__
    return refuse


@pytest.mark.parametrize("name", ["mmdet", "Video Swin", "HAT"])
def test_a_block_that_cannot_run_gets_its_mask(name):
    """A hook on one attention: its block runs as its source, the others stay fast."""
    model = network(name)
    model.eval()
    x = NETWORKS[name][1][-1]
    with torch.no_grad():
        expected = model(x)
        af.accelerate(model)
        attention = next(module for path, module in model.named_modules() if path.endswith("blocks.1.attn"))
        attention.register_forward_hook(lambda *args: None)
        with backends.forget_notices(), pytest.warns(backends.FallbackWarning, match="its attn has a forward hook"):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_another_mask_runs_the_source():
    model = network("mmdet")
    model.eval()
    stage = model.layers[0]
    x, block = torch.randn(2, 9 * 10, 12), stage.blocks[1]
    block.H, block.W = 9, 10
    mask = -torch.rand(9, 16, 16)
    with torch.no_grad():
        expected = block(x, mask)
        af.accelerate(model)
        with backends.forget_notices(), pytest.warns(backends.FallbackWarning, match="is not that of its shift"):
            torch.testing.assert_close(block(x, mask), expected)
    assert isinstance(block, Replacement)


@pytest.mark.parametrize("name", ["Swin", "SwinIR", "mmdet", "HAT"])
def test_compiled(name):
    model = network(name)
    model.eval()
    x = NETWORKS[name][1][-1]
    with torch.no_grad():
        expected = model(x)
        af.accelerate(model)
        with backends.forget_notices(), warnings.catch_warnings():
            warnings.simplefilter("error", backends.FallbackWarning)
            actual = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
