"""Detectors: torchvision's numbers, the paper's size, the cascade, images of extreme shapes, nothing to find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import asvit_fast as af
from asvit_fast.cost import params
from asvit_fast.detection import Detector, detector_macs
from asvit_fast.detection.pictures import draw
from asvit_fast.errors import InputError

SMALL = "8,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"
HEADS: dict[str, Any] = {"representation_size": 16, "mask_layers": (8, 8), "min_size": 96, "max_size": 128}
MAKERS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
NO_BOXES = torch.zeros(0, 4)


def make(name: str, what: Any = SMALL, **options: Any) -> Detector:
    torch.manual_seed(0)
    made = getattr(af.detection, name)(af.detection.backbone(what, out_channels=8), 5, **{**HEADS, **options})
    return made


def maps(batch: int = 1) -> dict[str, Tensor]:
    return {
        name: torch.randn(batch, 8, 24 >> i or 1, 32 >> i or 1) for i, name in enumerate(("0", "1", "2", "3", "pool"))
    }


def target(height: int, width: int, boxes: list[list[float]]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.arange(1, len(boxes) + 1), "masks": masks,
    }  # fmt: skip


def test_parameters_of_table_8() -> None:
    """As-ViT Large with the cascade: the paper's 138.8 M; a ResNet-50 with the same parts 77.3 M (by hand)."""
    with torch.device("meta"):
        large = af.detection.cascade_mask_rcnn(af.detection.backbone("asvit_large"), num_classes=81)
        resnet = af.detection.cascade_mask_rcnn(af.detection.backbone("resnet50", norm=False), num_classes=81)
    assert params(large) / 1e6 == pytest.approx(138.8, rel=0.01)
    assert large.backbone.body.pos_embed.shape == (1, 56, 56, 180)
    macs = detector_macs(large, 1024)
    assert macs["body"] / 1e9 == pytest.approx(467, rel=0.02)  # windows of 28, 28, 14 and 7 tokens
    assert macs["all"] == sum(value for name, value in macs.items() if name != "all")
    assert params(resnet) / 1e6 == pytest.approx(77.3, abs=0.05)


@pytest.mark.parametrize("what", ["resnet18", "asvit"])
def test_torchvisions_mask_rcnn_finds_the_same(what: str) -> None:
    options: dict[str, Any] = {
        "min_size": 96, "max_size": 160, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 30,
        "box_detections_per_img": 8,
    }  # fmt: skip
    torch.manual_seed(1)
    if what == "resnet18":
        trunk: Any = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        ours = af.detection.mask_rcnn(af.detection.backbone(torchvision.models.resnet18(), norm=False), 4, **options)
    else:
        trunk = af.detection.backbone(SMALL)
        ours = af.detection.mask_rcnn(af.detection.backbone(SMALL), 4, **options)
    theirs = MaskRCNN(trunk, 4, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    images = [torch.rand(3, 100, 75), torch.rand(3, 64, 120)]
    with torch.no_grad():
        for a, b in zip(ours.eval()(images), theirs(images), strict=True):
            assert len(a["boxes"]) == len(b["boxes"]) > 0
            for name in ("boxes", "scores", "masks"):
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
            assert torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("name", MAKERS)
def test_every_weight_learns(name: str) -> None:
    """Also from a batch whose second image has nothing in it."""
    made = make(name).train()
    images = [torch.rand(3, 100, 80), torch.rand(3, 60, 120)]
    losses = made(images, [target(100, 80, [[10, 10, 60, 80], [20, 30, 50, 60]]), target(60, 120, [])])
    assert ("loss_mask" in "".join(losses)) == ("mask" in name)
    sum(losses.values()).backward()
    missing = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize("name", MAKERS)
def test_accelerate_changes_nothing(name: str) -> None:
    from asvit_fast.acceleration.timm_swin import FastSwinTransformerBlock

    swin = af.detection.backbone("swin_tiny_patch4_window7_224", depths=(1, 2, 1, 1), embed_dim=24, out_channels=8)
    torch.manual_seed(0)
    made = getattr(af.detection, name)(swin, 5, **HEADS, box_score_thresh=0.0).eval()
    images = [torch.rand(3, 90, 70)]
    with torch.no_grad():
        before = made(images)[0]
        af.accelerate(made)
        assert any(isinstance(module, FastSwinTransformerBlock) for module in made.modules())
        after = made(images)[0]
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_boxes_are_exact_in_bfloat16(name: str) -> None:
    """Large images: pixels above 256 are no numbers of bfloat16."""
    made = make(name, box_score_thresh=0.0, min_size=512, max_size=512, box_detections_per_img=20).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        boxes = made([torch.rand(3, 512, 512)])[0]["boxes"]
    assert boxes.dtype == torch.float32
    assert (boxes != boxes.bfloat16().float()).any()


@pytest.mark.parametrize("name", MAKERS)
def test_no_proposals(name: str) -> None:
    heads = make(name).roi_heads
    found, _ = heads.eval()(maps(), [NO_BOXES], [(96, 128)], None)
    assert all(len(value) == 0 for value in found[0].values())
    assert ("masks" in found[0]) == ("mask" in name)
    _, losses = heads.train()(maps(), [NO_BOXES], [(96, 128)], [target(96, 128, [])])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_an_image_of_32_by_4000(name: str) -> None:
    """torchvision would take strides from its height without padding, 1 pixel for each of the finest map."""
    made = make(name, box_score_thresh=0.0, min_size=800, max_size=1333).eval()
    with torch.no_grad():
        found = made([torch.rand(3, 32, 4000)])[0]
    boxes = found["boxes"]
    assert len(boxes) and found["masks"].shape[1:] == (1, 32, 4000)
    assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([4000.01, 32.01])).all()
    heads = made.roi_heads if name == "mask_rcnn" else made.roi_heads.last
    assert heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_strides_follow_the_tokens(reduction: int) -> None:
    """Coarse tokens, then full ones in the same detector."""
    from asvit_fast.training import set_token_reduction

    made = make("mask_rcnn").eval()
    for now in (reduction, 1):
        set_token_reduction(made, now)
        with torch.no_grad():
            made([torch.rand(3, 96, 128)])
        assert made.roi_heads.box_roi_pool.scales == [1 / (4 * now * 2**i) for i in range(4)]


def test_images_are_padded_as_chosen() -> None:
    """RoIAlign finds the strides of maps by the padding, too."""
    made = make("faster_rcnn", size_divisible=64).eval()
    batch, _ = made.transform([torch.rand(3, 96, 70)])
    assert batch.tensors.shape[2:] == (128, 128)
    pool = made.roi_heads.box_roi_pool
    with torch.no_grad():
        pool(made.backbone(batch.tensors), [torch.tensor([[8.0, 8, 60, 50]])], batch.image_sizes)
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_cascade_by_hand() -> None:
    """Boxes go from stage to stage inside the image, scores and masks are averaged, the last boxes count."""
    made = make("cascade_mask_rcnn", box_score_thresh=0.0, box_nms_thresh=1.0, box_detections_per_img=1000).eval()
    heads, features = made.roi_heads, maps()
    boxes = torch.tensor([[8.0, 8, 60, 50], [30, 20, 90, 80]])
    with torch.no_grad():
        for number, stage in enumerate(heads.stages.values()):
            stage.box_predictor.bbox_pred.bias.fill_(5.0 * (number + 1))  # boxes move by half their sides
        found = heads(features, [boxes], [(96, 128)])[0][0]
        scores, masks = [], []
        for stage in heads.stages.values():
            logits, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, [boxes], [(96, 128)])))
            scores.append(logits.softmax(1))
            boxes = stage.box_coder.decode(deltas[:, :4], [boxes])[:, 0]
            boxes = torchvision.ops.clip_boxes_to_image(boxes, (96, 128))
            pooled = stage.mask_roi_pool(features, [found["boxes"]], [(96, 128)])
            logits = stage.mask_predictor(stage.mask_head(pooled))  # [8, 5, 28, 28]
            masks.append(logits[torch.arange(8), found["labels"], None].sigmoid())
        mean = torch.stack(scores).mean(0)[:, 1:]  # [2, 4]: without the background
    order = mean.flatten().argsort(descending=True)
    torch.testing.assert_close(found["scores"], mean.flatten()[order])
    torch.testing.assert_close(found["boxes"], boxes.repeat_interleave(4, 0)[order], rtol=1e-4, atol=1e-3)
    assert torch.equal(found["labels"], (order % 4) + 1)
    torch.testing.assert_close(found["masks"], torch.stack(masks).mean(0))


def test_stages_of_a_cascade_learn_from_their_own_overlaps() -> None:
    """IoU 0.55 is an object for the first stage, background for the second and third."""
    made = make("cascade_rcnn", box_batch_size_per_image=4, box_positive_fraction=1.0)
    truth = torch.tensor([[0.0, 0, 100, 100]])
    proposal = torch.tensor([[0.0, 0, 100, 55]])
    labels = [
        stage.assign_targets_to_proposals([proposal], [truth], [torch.tensor([3])])[1][0].item()
        for stage in made.roi_heads.stages.values()
    ]
    assert labels == [3, 0, 0]
    assert [stage.box_coder.weights[0] for stage in made.roi_heads.stages.values()] == [10, 20, 30]


def test_overlaps_of_objects_and_of_background() -> None:
    """What overlaps by less than an object and more than background is neither."""
    heads = make("faster_rcnn", box_fg_iou_thresh=0.6, box_bg_iou_thresh=0.4).roi_heads
    proposals = torch.tensor([[0.0, 0, 100, side] for side in (70, 50, 30)])
    _, (labels,) = heads.assign_targets_to_proposals(
        [proposals], [torch.tensor([[0.0, 0, 100, 100]])], [torch.tensor([3])]
    )
    assert labels.tolist() == [3, -1, 0]


def test_losses_of_stages_count_by_their_weights() -> None:
    """1, 0.5 and 0.25 (arXiv 1712.00726, section 4), and others that are chosen."""
    found = []
    for weights in (None, (1.0, 1.0, 1.0), (0.0, 2.0, 3.0)):
        made = make("cascade_mask_rcnn", **({} if weights is None else {"cascade_loss_weights": weights})).train()
        torch.manual_seed(1)  # which the samplers draw with
        found.append(made([torch.full((3, 100, 80), 0.5)], [target(100, 80, [[10, 10, 60, 80]])]))
    default, equal, chosen = found
    for number, (ours, theirs) in enumerate(zip((1.0, 0.5, 0.25), (0.0, 2.0, 3.0), strict=True)):
        for name in (f"loss_{kind}_{number}" for kind in ("classifier", "box_reg", "mask")):
            torch.testing.assert_close(default[name], ours * equal[name])
            torch.testing.assert_close(chosen[name], theirs * equal[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_score_tresh": 0.1}, "unknown option box_score_tresh"),
        ({"anchor_sizes": (32,)}, "one for each of 5 maps"),
        ({"cascade_ious": (0.5,)}, "an entry for each stage"),
        ({"cascade_ious": (0.5, 0.6, 7)}, "cascade_ious must be numbers above 0 and up to 1"),
        ({"cascade_reg_weights": (1, 2, 3)}, "four numbers above 0 for each stage"),
        ({"anchor_sizes": 32}, "anchor_sizes must be numbers above 0, got 32"),
        ({"aspect_ratios": ()}, "aspect_ratios must be numbers above 0"),
        ({"mask_layers": ()}, "mask_layers must be whole numbers above 0"),
        ({"min_size": 0}, "min_size must be an integer of 1 or more, got 0"),
        ({"min_size": 900}, r"max_size must be min_size \(900\) or more, got 128"),
        ({"representation_size": 0}, "representation_size must be an integer of 1 or more"),
        ({"box_batch_size_per_image": -1}, "box_batch_size_per_image must be"),
        ({"box_nms_thresh": "x"}, "box_nms_thresh must be a number, got 'x'"),
        ({"box_nms_thresh": 2.0}, "box_nms_thresh must be a number from 0 to 1"),
        ({"box_fg_iou_thresh": 0.3}, r"box_bg_iou_thresh must be box_fg_iou_thresh \(0.3\) or less"),
        ({"image_std": (0, 0, 0)}, "image_std must be numbers above 0"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("cascade_rcnn", **options)


def test_thin_images() -> None:
    """As torchvision scales them, no pixel of the short side would be left."""
    made = make("faster_rcnn", box_score_thresh=0.0)
    image = torch.rand(3, 2, 900)
    with torch.no_grad():
        found = made.eval()([image, torch.rand(3, 40, 60)])
    assert len(found) == 2 and found[0]["boxes"][:, 3].max() <= 2
    made.train()
    boxes = torch.tensor([[100.0, 0, 700, 2]])
    losses = made([image], [{"boxes": boxes, "labels": torch.tensor([1])}])
    assert all(loss.isfinite() for loss in losses.values())


def test_backbones_of_others() -> None:
    with pytest.raises(InputError, match="out_channels"):
        af.detection.mask_rcnn(nn.Linear(2, 2))
    with pytest.raises(InputError, match="num_classes"):
        af.detection.mask_rcnn(af.detection.backbone(SMALL, out_channels=8), num_classes=1)


def test_pictures_of_thin_images_stay_small() -> None:
    """Small images are enlarged until text can be read, not to gigabytes."""
    nothing = {"boxes": NO_BOXES, "labels": torch.zeros(0, dtype=torch.int64)}
    assert draw(Image.new("RGB", (900, 5)), nothing, []).size == (3600, 20)
    assert draw(Image.new("RGB", (100, 60)), nothing, []).size == (800, 480)
    assert draw(Image.new("RGB", (9000, 5)), nothing, []).size == (9000, 5)
