"""Our networks in other people's detectors and segmentation: each where its library is installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torchvision.models.detection import FasterRCNN

import asvit_fast as af

SMALL = "8,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"
IMAGE = (1, 3, 96, 64)


def test_torchvision() -> None:
    """Its own Faster R-CNN takes the backbone as it is."""
    made = FasterRCNN(af.detection.backbone(SMALL, out_channels=8), 3, min_size=64, max_size=96).eval()
    with torch.no_grad():
        assert set(made([torch.rand(3, 50, 70)])[0]) == {"boxes", "labels", "scores"}


def transformers_config() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.TimmBackboneConfig(
        backbone="asvit_seed", use_pretrained_backbone=False, out_indices=[0, 1, 2, 3]
    )


def test_auto_backbone_of_transformers() -> None:
    config = transformers_config()
    import transformers

    made = transformers.AutoBackbone.from_config(config)
    maps = made(torch.randn(IMAGE)).feature_maps
    assert made.channels == [32, 64, 128, 256]
    assert [tuple(one.shape[2:]) for one in maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]


TINY = {
    "num_queries": 5, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip


def test_detr_and_maskformer_of_transformers() -> None:
    config = transformers_config()
    import transformers

    detr = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=config, **TINY)).eval()
    decoder = transformers.DetrConfig(**TINY)
    mask_former = transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(
            backbone_config=config, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32
        )
    ).eval()
    with torch.no_grad():
        assert detr(torch.randn(IMAGE)).pred_boxes.shape == (1, 5, 4)
        assert mask_former(torch.randn(IMAGE)).masks_queries_logits.shape == (1, 5, 24, 16)


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_segmentation_models_pytorch(decoder: str) -> None:
    library = pytest.importorskip("segmentation_models_pytorch")
    made = getattr(library, decoder)("tu-asvit_seed", encoder_weights=None, classes=3).eval()
    with torch.no_grad():
        assert made(torch.randn(IMAGE)).shape == (1, 3, 96, 64)


def test_detectron2() -> None:
    """The contract of its Backbone: output_shape, size_divisibility, padding_constraints."""
    modeling = pytest.importorskip("detectron2.modeling")
    from asvit_fast.detection.detectron2 import detectron2_backbone

    made = detectron2_backbone(SMALL, out_channels=8)
    assert isinstance(made, modeling.Backbone)
    maps = made(torch.randn(IMAGE))
    for name, shape in made.output_shape().items():
        assert maps[name].shape[:2] == (1, shape.channels) and maps[name].shape[2] == -(-96 // shape.stride)
    assert made.size_divisibility == 32 and made.padding_constraints["size_divisibility"] == 32


def test_mmdet() -> None:
    registry = pytest.importorskip("mmdet.registry")
    from asvit_fast.detection.mmdet import AsViTFast

    assert registry.MODELS.get("AsViTFast") is AsViTFast
    made = AsViTFast(SMALL, with_cp=True, frozen_stages=1)
    assert [tuple(one.shape[1:]) for one in made(torch.randn(IMAGE))] == [
        (16, 24, 16), (32, 12, 8), (64, 6, 4), (128, 3, 2),
    ]  # fmt: skip


def test_nothing_is_imported_before_it_is_used() -> None:
    program = (
        "import sys, asvit_fast, asvit_fast.cli; "
        "print([name for name in ('pycocotools', 'torchvision.models.detection', 'torch') if name in sys.modules]);"
        "asvit_fast.detection; print('pycocotools' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr
