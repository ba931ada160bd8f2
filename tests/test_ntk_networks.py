"""The NTK Gram of timm's and torchvision's networks against one backward pass per image, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from ntk_oracle import assert_gram_is_right
from timm.layers import GroupNormAct, StdConv2d
from timm.models.efficientformer import EfficientFormer
from timm.models.levit import Levit
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.resnetv2 import ResNetV2
from timm.models.tiny_vit import TinyVit
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:asvit_fast. the NTK differentiates")

TINY: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 2}
STAGES: dict[str, Any] = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=0, **options)


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(torchvision.models.get_model, name, num_classes=5, **options)


def levit(use_conv: bool) -> nn.Module:
    small = {"embed_dim": (32, 32, 48), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 2, 3)}
    return Levit(64, use_conv=use_conv, num_classes=0, **small)


def norm_free() -> nn.Module:
    small = NfCfg(
        (1, 1, 1, 1),
        (16, 24, 32, 48),
        stem_type="deep_quad",
        stem_chs=16,
        group_size=8,
        attn_layer="se",
        attn_kwargs={},
    )
    return NormFreeNet(small, num_classes=0)


def big_transfer() -> nn.Module:
    """Weight standardisation and group norm, as BiT."""
    norms = partial(GroupNormAct, num_groups=4)
    return ResNetV2(
        (1, 1), (32, 64), num_classes=0, stem_chs=16, stem_type="fixed", conv_layer=StdConv2d, norm_layer=norms
    )


def tiny_vit() -> nn.Module:
    small = {"embed_dims": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return TinyVit(num_classes=0, window_sizes=(4, 4, 4, 2), **small)


def efficientformer() -> nn.Module:
    return EfficientFormer((1, 1, 1, 2), (8, 8, 16, 16), num_vit=1, num_classes=0)


NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # pixels, network
    **{
        name: (32, named(name))
        for name in (
            "convnext_atto",
            "cs3darknet_focus_s",
            "edgenext_xx_small",
            "ghostnet_050",
            "inception_next_atto",
            "mnasnet_small",
            "mobilenetv3_small_050",
            "mobilenetv4_conv_small",
            "nf_regnet_b0",
            "regnetx_002",
            "regnety_002",
            "repghostnet_050",
            "resnet10t",
            "test_byobnet",
            "test_convnext",
            "test_convnext2",
            "test_convnext3",
            "test_efficientnet",
            "test_efficientnet_evos",
            "test_efficientnet_gn",
            "test_efficientnet_ln",
            "test_mambaout",
            "test_nfnet",
            "test_resnet",
        )
    },
    **{name: (64, named(name)) for name in ("efficientvit_b0", "mobilevit_xxs", "mobilevitv2_050")},
    **{
        name: (64, named(name, img_size=64))
        for name in ("pit_ti_224", "test_vit", "test_vit2", "test_vit3", "test_vit4")
    },
    **{
        name: (32, named(name, img_size=32, **TINY))
        for name in (
            "beit_base_patch16_224",
            "naflexvit_base_patch16_gap",
            "vit_base_patch16_clip_224",
            "vit_base_patch16_rope_reg1_gap_256",
            "vit_base_patch16_siglip_224",
            "vit_medium_patch16_gap_240",
            "vit_relpos_base_patch16_224",
        )
    },
    **{
        name: (32, named(name, img_size=32, depth=2))
        for name in (
            "cait_xxs24_224",
            "deit_tiny_distilled_patch16_224",
            "tnt_s_patch16_224",
            "tnt_s_legacy_patch16_224",
            "vit_pwee_patch16_reg1_gap_256",
            "vit_tiny_patch16_224",
            "vit_tiny_r_s16_p8_224",
            "vit_wee_patch16_reg1_gap_256",
            "xcit_nano_12_p16_224",
        )
    },
    "asvit_seed": (32, named("asvit_seed", img_size=32)),
    "convit_tiny": (32, named("convit_tiny", img_size=32, depth=3)),
    "davit_tiny": (32, named("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2))),
    "densenet121": (32, named("densenet121", block_config=(2, 2), growth_rate=8)),
    "efficientformer": (224, efficientformer),
    "eva02_tiny_patch14_224": (28, named("eva02_tiny_patch14_224", img_size=28, depth=1)),
    "gmlp_ti16_224": (32, named("gmlp_ti16_224", img_size=32)),
    "levit": (64, partial(levit, False)),
    "levit_conv": (64, partial(levit, True)),
    "nfnet": (32, norm_free),
    "resnetv2 with weight standardisation": (32, big_transfer),
    "samvit_base_patch16": (
        64,
        named("samvit_base_patch16", img_size=64, global_attn_indexes=(1,), **TINY | {"depth": 2}),
    ),
    "swin_s3_tiny_224": (56, named("swin_s3_tiny_224", img_size=56, window_size=(7, 7), **STAGES)),
    "swin_tiny_patch4_window7_224": (28, named("swin_tiny_patch4_window7_224", img_size=28, **STAGES)),
    "swinv2_cr_tiny_ns_224": (32, named("swinv2_cr_tiny_ns_224", img_size=32, window_size=4, **STAGES)),
    "swinv2_tiny_window8_256": (32, named("swinv2_tiny_window8_256", img_size=32, **STAGES)),
    "tiny_vit": (64, tiny_vit),
    "torchvision mobilenet_v3_small": (32, of_torchvision("mobilenet_v3_small")),
    "torchvision shufflenet_v2_x0_5": (32, of_torchvision("shufflenet_v2_x0_5")),
    "torchvision squeezenet1_1": (64, of_torchvision("squeezenet1_1")),
    "torchvision swin": (
        32,
        partial(torchvision.models.SwinTransformer, [4, 4], 16, [2, 2], [1, 2], [4, 4], num_classes=5),
    ),
    "torchvision vit": (32, partial(torchvision.models.VisionTransformer, 32, 16, 1, 2, 32, 64, num_classes=5)),
}

SLOW: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    **{
        name: (32, named(name))
        for name in (
            "caformer_s18",
            "convnextv2_atto",
            "dla34",
            "dpn48b",
            "eca_nfnet_l0",
            "efficientnet_b0",
            "gernet_s",
            "hardcorenas_a",
            "hgnetv2_b0",
            "hrnet_w18_small",
            "legacy_seresnet18",
            "mambaout_femto",
            "mobileone_s0",
            "poolformer_s12",
            "res2net50_14w_8s",
            "resnest14d",
            "resnet50_clip",
            "resnetv2_18",
            "rexnet_100",
            "skresnet18",
            "starnet_s1",
            "tf_efficientnetv2_b0",
        )
    },
    **{
        name: (64, named(name))
        for name in ("csatv2", "fastvit_t8", "lambda_resnet26t", "pvt_v2_b0", "repvit_m1", "shvit_s1")
    },
    **{
        name: (64, named(name, img_size=64))
        for name in (
            "botnet26t_256",
            "coat_tiny",
            "coatnet_pico_rw_224",
            "efficientformerv2_s0",
            "gcvit_xxtiny",
            "hiera_tiny_224",
            "levit_128s",
            "maxvit_rmlp_pico_rw_256",
            "mvitv2_tiny",
            "twins_pcpvt_small",
            "twins_svt_small",
            "visformer_tiny",
        )
    },
    "efficientformer_l1": (224, named("efficientformer_l1")),
    "sequencer2d_s": (32, named("sequencer2d_s", img_size=32, layers=(1, 1, 1, 1))),
    "torchvision googlenet": (64, of_torchvision("googlenet", init_weights=False)),
    "torchvision swin_v2_t": (32, of_torchvision("swin_v2_t")),
    "vgg11": (32, named("vgg11")),
}


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_gram_of_networks(name: str) -> None:
    torch.manual_seed(0)
    pixels, build = (NETWORKS | SLOW)[name]
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():  # many begin at zero, which hides what is behind them
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert_gram_is_right(model, torch.randn(2, 3, pixels, pixels, dtype=torch.float64))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_resnet", "asvit_seed"])
@pytest.mark.filterwarnings("ignore")
def test_gram_of_checkpointed_networks(name: str) -> None:
    torch.manual_seed(0)
    pixels, build = NETWORKS[name]
    model = build().double()
    model.set_grad_checkpointing(True)
    assert_gram_is_right(model, torch.randn(3, 3, pixels, pixels, dtype=torch.float64))
