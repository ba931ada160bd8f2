"""Backbones: maps of any network, windows, norms, freezing, checkpointing, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import asvit_fast as af
from asvit_fast.cost import count_macs
from asvit_fast.errors import InputError

backbone = af.detection.backbone
SMALL = "8,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"


def sizes(made: nn.Module, height: int, width: int) -> list[tuple[int, ...]]:
    with torch.no_grad():
        return [tuple(one.shape[1:]) for one in made(torch.randn(1, 3, height, width)).values()]


def expected(height: int, width: int, channels: int) -> list[tuple[int, ...]]:
    return [(channels, -(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize(
    ("what", "options"),
    [
        (SMALL, {}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 24}),
        ("resnet18", {"norm": False}),
        ("pvt_v2_b0", {}),
        ("dla34", {}),
        ("hrnet_w18_small", {}),
    ],
)
def test_maps_of_any_size(what: str, options: dict[str, Any]) -> None:
    """One backbone, nothing rebuilt: odd sizes, extreme shapes, the smallest."""
    made = backbone(what, out_channels=8, **options).eval()
    names = list(made.state_dict())
    for height, width in ((96, 64), (70, 45), (32, 32), (32, 400)):
        assert sizes(made, height, width) == expected(height, width, 8)
    assert list(made.state_dict()) == names
    assert made.out_channels == 8
    assert list(made(torch.randn(1, 3, 64, 64))) == ["0", "1", "2", "3", "pool"]  # BackboneWithFPN's contract


@pytest.mark.parametrize(
    "make", [torchvision.models.resnet18, torchvision.models.swin_t, torchvision.models.mobilenet_v3_small]
)
def test_networks_of_torchvision(make: Any) -> None:
    network = make(weights=None)
    made = backbone(network, out_channels=8).eval()
    assert sizes(made, 64, 96) == expected(64, 96, 8)
    assert any(name.startswith(("fc.", "head.", "classifier.")) for name in network.state_dict())  # left as it was


def test_windows_are_those_of_the_weights() -> None:
    """28, 28, 14 and 7 tokens for 224 pixels, whatever the image; split windows grow with it."""
    fixed, split = (backbone("asvit_seed", windows=windows, out_channels=8) for windows in ("fixed", "split"))
    assert [stage.blocks[0].attn.window for stage in fixed.body.stages] == [(28, 28), (28, 28), (14, 14), (7, 7)]
    assert [stage.blocks[0].attn.window for stage in split.body.stages] == [None] * 4
    half = backbone("asvit_seed", img_size=112, out_channels=8)
    assert [stage.blocks[0].attn.window for stage in half.body.stages] == [(14, 14), (14, 14), (7, 7), (4, 4)]
    assert count_macs(fixed, 224) == count_macs(split, 224)
    assert count_macs(fixed, 896) < count_macs(split, 896)
    swin = backbone("swin_tiny_patch4_window7_224", depths=(1, 2, 1, 1), out_channels=8)
    assert [block.shift_size for block in swin.body.layers[1].blocks] == [(0, 0), (3, 3)]


def test_windows_that_do_not_divide_the_map() -> None:
    """20, 10, 5 and 3 tokens to a side, in 8, 4, 2 and 1 windows to a side."""
    made = backbone("4,8,2,1|2,4,2,1|2,2,2,1|2,1,2,1|16,16", img_size=80, out_channels=8)
    assert made.body.window_size == ((3, 3), (3, 3), (3, 3), (3, 3))


def test_the_same_numbers_as_the_network() -> None:
    """At its own size a backbone's maps are those of the network's stages, normalised."""
    network = timm.create_model("asvit", topology=SMALL, img_size=64).eval()
    made = backbone(network, norm=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = network.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
        for ours, theirs in zip(made.features(x), maps, strict=True):
            normal = nn.functional.layer_norm(theirs.permute(0, 2, 3, 1), theirs.shape[1:2]).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours, normal)
    assert hasattr(network, "head") and not any(name.startswith("body.head") for name in made.state_dict())


@pytest.mark.parametrize("what", [SMALL, "resnet18"])
def test_frozen_stages_keep_their_weights_and_modes(what: str) -> None:
    made = backbone(what, out_channels=8, frozen_stages=2).train()
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    first, stages = ("conv1", "layer") if what == "resnet18" else ("patch_embed.proj", "stages.")
    start = 1 if what == "resnet18" else 0
    assert f"body.{first}.weight" in frozen
    for index in range(4):
        names = [name for name in made.state_dict() if name.startswith(f"body.{stages}{start + index}.")]
        weights = [name for name in names if name.endswith("weight")]
        assert weights and all((name in frozen) == (index < 2) for name in weights)
    assert not any(name.startswith(("fpn", "norms")) for name in frozen)
    stage = made.body.layer1 if what == "resnet18" else made.body.stages[0]
    assert not stage.training and made.fpn.training
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(torch.randn(2, 3, 64, 64))["0"].sum().backward()
    after = made.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}  # BatchNorm's averages
    assert not any(name.startswith(("body.bn1", "body.layer1", "body.layer2")) for name in changed)


def test_checkpointing_gives_the_same_gradients() -> None:
    made = backbone(SMALL, out_channels=8)
    x = torch.randn(1, 3, 64, 64)

    def gradients() -> list[torch.Tensor]:
        made.zero_grad()
        sum(one.square().mean() for one in made(x).values()).backward()
        return [parameter.grad.clone() for parameter in made.parameters()]

    plain = gradients()
    made.set_grad_checkpointing()
    assert made.body.stages[0].grad_checkpointing
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_one_graph_for_all_sizes() -> None:
    made = backbone(SMALL, img_size=160, out_channels=8).eval()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(made, dynamic=True, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    with torch.no_grad():
        # smaller than the windows, on the embedding's grid, larger; torch's own convolution makes graphs of its own for
        # a last map of fewer than three rows or columns, and from 40,960 pixels on
        for height, width in ((96, 128), (128, 96), (160, 160), (160, 192), (128, 224), (192, 128)):
            x = torch.randn(1, 3, height, width)
            for ours, theirs in zip(compiled(x).values(), made(x).values(), strict=True):
                torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1
    nodes = [node.meta["val"] for node in graphs[0].graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert not any("M" in str(node.shape) for node in nodes)  # Min and Max make inductor minutes slower


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("vit_small_patch16_224", {}, "one size only"),
        ("maxvit_tiny_rw_224", {}, "one size only"),
        ("resnet18", {"windows": "split"}, "windows='split' is As-ViT's"),
        (SMALL, {"windows": "moving"}, "fixed, split"),
        (SMALL, {"frozen_stages": 5}, "at most 4"),
        (SMALL, {"out_channels": 0}, "1 or more"),
        ("resnet18", {"colour": 1}, "resnet18 cannot be made with these arguments.*colour"),
        (None, {}, "a topology, a name or a network, got NoneType"),
        ("asvit_smal", {}, "did you mean asvit_small"),
        (torchvision.models.AlexNet(), {}, "strides none"),
        (torchvision.models.AlexNet(), {"depths": 2}, "made already"),
    ],
)
def test_mistakes(what: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        backbone(what, **options)


def test_layer_decay_knows_the_layers_of_the_body() -> None:
    made = af.detection.mask_rcnn(backbone(SMALL, out_channels=8), 3, representation_size=8, mask_layers=(8,))
    groups = timm.optim.param_groups_layer_decay(made, weight_decay=0.1, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    body = made.backbone.body
    stages = [scale[id(stage.blocks[0].mlp.fc1.weight)] for stage in body.stages]
    assert scale[id(body.patch_embed.proj.weight)] < stages[0] < stages[1] < stages[2] < stages[3] < 1
    assert scale[id(made.roi_heads.box_head.fc6.weight)] == scale[id(made.backbone.norms[0].weight)] == 1
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay[id(body.patch_embed.proj.bias)] == 0 and decay[id(body.patch_embed.proj.weight)] == 0.1
