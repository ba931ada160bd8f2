"""Our networks in other people's detectors and segmentation: each where its library is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
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


SIZES = ((70, 53), (64, 97))  # pixels, odd ones


def learns(model: Any, losses: dict[str, Any]) -> None:
    """Every loss is finite, and every weight that is not frozen has a gradient."""
    total = sum(sum(loss) if isinstance(loss, list) else loss for loss in losses.values())
    assert losses and torch.isfinite(total)
    total.backward()
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []


def classifier(path: Path) -> af.AsViT:
    """A network whose weights are written to ``path``, as trainings do."""
    made = af.create_model(SMALL, num_classes=5, pos_embed="absolute")
    torch.save({"state_dict": made.state_dict()}, path)
    return made


def detectron2_images(train: bool) -> list[dict[str, Any]]:
    from detectron2.structures import Boxes, Instances

    images: list[dict[str, Any]] = [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for size in SIZES]
    for image, size in zip(images, SIZES, strict=True):
        truth = Instances(size, gt_boxes=Boxes(torch.tensor([[5.0, 6, 40, 50]])), gt_classes=torch.tensor([1]))
        image |= {"instances": truth} if train else {"height": 2 * size[0], "width": 2 * size[1]}
    return images


def works_in_detectron2(model: Any) -> None:
    """Losses and gradients in training, boxes in the image that is asked for in evaluation."""
    from detectron2.utils.events import EventStorage

    with EventStorage():  # losses write numbers to its Trainer's
        learns(model, model.train()(detectron2_images(train=True)))
    with torch.no_grad():
        found = [one["instances"] for one in model.eval()(detectron2_images(train=False))]
    assert [one.image_size for one in found] == [(2 * height, 2 * width) for height, width in SIZES]
    assert all(torch.isfinite(one.pred_boxes.tensor).all() for one in found)


def test_detectron2(tmp_path: Path) -> None:
    """The contract of its Backbone: output_shape, size_divisibility, padding_constraints."""
    modeling = pytest.importorskip("detectron2.modeling")
    from asvit_fast.detection.detectron2 import AsViTFastBackbone

    weights = classifier(tmp_path / "best.pth.tar")
    options = {"checkpoint_path": str(tmp_path / "best.pth.tar"), "num_classes": 5}
    made = AsViTFastBackbone(SMALL, out_channels=8, frozen_stages=1, **options)
    assert isinstance(made, modeling.Backbone)
    maps = made(torch.randn(IMAGE))
    assert list(maps) == list(made.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    for name, shape in made.output_shape().items():
        sides = tuple(-(-side // shape.stride) for side in IMAGE[2:])
        assert maps[name].shape == (1, shape.channels, *sides), name
    assert made.size_divisibility == 32
    assert made.padding_constraints == {"square_size": 0, "size_divisibility": 32}
    state, given = made.pyramid.body.state_dict(), weights.state_dict()
    assert state and all(torch.equal(value, given[name]) for name, value in state.items())


def test_detectron2_yaml(tmp_path: Path) -> None:
    """A Faster R-CNN of get_cfg, with options of ours."""
    config = pytest.importorskip("detectron2.config")
    from detectron2.modeling import build_model

    from asvit_fast.detection.detectron2 import add_config

    cfg = config.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_asvit_fast_backbone"
    with pytest.raises(af.InputError, match="add_config"):
        build_model(cfg)
    add_config(cfg)
    ours = {"NAME": SMALL, "OPTIONS": {"frozen_stages": 1, "drop_path_rate": 0.1}}
    levels = ["p2", "p3", "p4", "p5", "p6"]
    model = {
        "MODEL": {
            "ASVIT_FAST": ours,
            "FPN": {"OUT_CHANNELS": 8},
            "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]]},
            "RPN": {"IN_FEATURES": levels, "PRE_NMS_TOPK_TRAIN": 20, "PRE_NMS_TOPK_TEST": 20},
            "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": levels[:4], "NUM_CLASSES": 3},
            "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 7},
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"VERSION": 2, **model}))
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    made = build_model(cfg)
    assert made.backbone.pyramid.frozen_stages == 1 and made.backbone.pyramid.out_channels == 8
    works_in_detectron2(made)


def test_detectron2_lazy_config() -> None:
    """Its Mask R-CNN of LazyConfig without masks."""
    config = pytest.importorskip("detectron2.config")
    from detectron2 import model_zoo

    from asvit_fast.detection.detectron2 import AsViTFastBackbone

    lazy = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    lazy.backbone = config.LazyCall(AsViTFastBackbone)(name_or_model=SMALL)
    lazy.proposal_generator.pre_nms_topk = lazy.proposal_generator.post_nms_topk = (20, 20)
    lazy.roi_heads.update(mask_in_features=None, mask_pooler=None, mask_head=None, num_classes=3)
    lazy.roi_heads.box_head.fc_dims = [16]
    lazy.roi_heads.box_predictor.input_shape.channels = 16
    works_in_detectron2(config.instantiate(lazy))


def mmdet_models() -> Any:
    """Its registry, which imports all of its models, and they the compiled operators of mmcv."""
    pytest.importorskip("mmcv.ops", reason="no mmcv with its operators", exc_type=ImportError)
    return pytest.importorskip("mmdet.registry").MODELS


def test_mmdet(tmp_path: Path) -> None:
    """By its registry, from a dictionary: maps, frozen stages, weights of a classifier and of itself."""
    models = mmdet_models()
    from asvit_fast.detection.mmdet import AsViTFast

    weights = classifier(tmp_path / "best.pth.tar").state_dict()
    config = {"type": "AsViTFast", "name": SMALL, "with_cp": True, "frozen_stages": 1, "num_classes": 5}
    made = models.build({**config, "checkpoint_path": str(tmp_path / "best.pth.tar")})
    assert isinstance(made, AsViTFast)
    assert [tuple(one.shape[1:]) for one in made(torch.randn(IMAGE))] == [
        (16, 24, 16), (32, 12, 8), (64, 6, 4), (128, 3, 2),
    ]  # fmt: skip
    assert made.channels == [16, 32, 64, 128]
    frozen = [name for name, one in made.named_parameters() if not one.requires_grad]
    assert frozen and len(frozen) < len(list(made.parameters()))
    made.init_weights()  # mmengine's Runner calls it
    assert all(torch.equal(value, weights[name]) for name, value in made.maps.body.state_dict().items())

    torch.save({"state_dict": made.state_dict()}, tmp_path / "backbone.pth")
    config["init_cfg"] = {"type": "Pretrained", "checkpoint": str(tmp_path / "backbone.pth")}
    other = models.build(config)
    other.init_weights()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in other.state_dict().items())

    assert AsViTFast(SMALL, frozen_stages=-1).maps.frozen_stages == 0
    with pytest.raises(af.InputError, match="out_indices"):
        AsViTFast(SMALL, out_indices=(1, 4))


def mmdet_detector(name: str, channels: list[int], **backbone: Any) -> Any:
    """A detector of mmdet's own configurations with our backbone and few weights, built by its registry."""
    models = mmdet_models()
    from mmdet.utils import register_all_modules
    from mmengine.hub import get_config

    import asvit_fast.detection.mmdet  # noqa: F401

    register_all_modules()
    config = get_config(f"mmdet::_base_/models/{name}_r50_fpn.py").model
    config.backbone = {"type": "AsViTFast", "name": SMALL, **backbone}
    config.neck.update(in_channels=channels, out_channels=8)
    if name == "retinanet":
        config.neck.start_level = 0
        config.bbox_head.update(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=3)
    else:
        config.rpn_head.update(in_channels=8, feat_channels=8)
        extractor = config.roi_head.bbox_roi_extractor
        extractor.out_channels = 8
        extractor.roi_layer.use_torchvision = True
        config.roi_head.bbox_head.update(in_channels=8, fc_out_channels=16, num_classes=3)
    return models.build(config)


@pytest.mark.parametrize(
    ("name", "out_indices", "channels"),
    [("faster-rcnn", (0, 1, 2, 3), [16, 32, 64, 128]), ("retinanet", (1, 2, 3), [32, 64, 128])],
)
def test_mmdet_detectors(name: str, out_indices: tuple[int, ...], channels: list[int]) -> None:
    """Losses and gradients of all weights in training, boxes in evaluation, images of odd sizes."""
    model = mmdet_detector(name, channels, out_indices=out_indices)
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in SIZES]
    samples = []
    for size in SIZES:
        shapes = {"img_shape": size, "ori_shape": size, "pad_shape": size, "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo=shapes)
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[5.0, 6, 40, 50]]), labels=torch.tensor([1]))
        samples.append(sample)
    data = model.data_preprocessor({"inputs": images, "data_samples": samples}, training=True)
    learns(model, model.train()(**data, mode="loss"))
    with torch.no_grad():
        found = model.eval()(**data, mode="predict")
    assert len(found) == 2 and all(torch.isfinite(one.pred_instances.bboxes).all() for one in found)


def test_nothing_is_imported_before_it_is_used() -> None:
    program = (
        "import sys, asvit_fast, asvit_fast.cli; "
        "print([name for name in ('pycocotools', 'torchvision.models.detection', 'torch') if name in sys.modules]);"
        "asvit_fast.detection; print('pycocotools' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr
