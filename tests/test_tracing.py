"""Networks, ours and accelerated ones, in torch's tracers: torch.fx, torch.jit, and the meta device."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import timm
import torch
from test_accelerate_families import MODELS, image, prepared
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn
from torchvision.models import feature_extraction

import asvit_fast as af
from asvit_fast.errors import InputError
from asvit_fast.ops import linear as linear_op

TOPOLOGY = "8,1,2|2,1,2|2,2,2|2,1,2|16"
EXTRAS = {"attn_scale": True, "feat_scale": True, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
FAMILIES = ("swin padded", "swinv2", "swinv2_cr", "maxvit rw", "tiny_vit padded", "davit", "twins", "nest", "pvt_v2")


def as_vit(**kwargs) -> nn.Module:
    kwargs = {"img_size": 64, "pos_embed": "absolute", "num_classes": 3} | kwargs
    return af.create_model(TOPOLOGY, **kwargs)


def network(name: str) -> tuple[nn.Module, Tensor]:
    """In evaluation, and images [2, 3, H, W]; "as-vit" on maps that windows do not divide."""
    if name == "as-vit":
        return prepared(as_vit).eval(), image(76)
    make, size, _ = MODELS[name]
    model = prepared(make).eval()
    af.accelerate(model)
    return model, image(size)


# --------------------------------------------------------------------------- torch.fx


@pytest.fixture
def products_by_onednn(monkeypatch) -> None:
    """Small products, too."""
    import sys

    monkeypatch.setattr(sys.modules[linear_op.__module__], "SMALL", 0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tool", ["symbolic_trace", "timm", "torchvision"])
def test_fx_is_the_network_bit_for_bit(products_by_onednn, tool, training):
    """Outputs and gradients."""
    model, x = network("as-vit")
    model.train(training)
    if tool == "symbolic_trace":
        graph = torch.fx.symbolic_trace(model)
    elif tool == "timm":
        extractor = create_feature_extractor(model, ["head"])
        graph = lambda image: extractor(image)["head"]  # noqa: E731
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nodes of training and evaluation differ
            extractor = feature_extraction.create_feature_extractor(model, ["head.fc2"])
        extractor.train(training)
        graph = lambda image: extractor(image)["head.fc2"]  # noqa: E731
    results = []
    for run in (model, graph):
        x.requires_grad_().grad = None
        output = run(x)
        output.square().sum().backward()
        results.append((output, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_accelerated_networks(name):
    """timm's feature extraction by torch.fx."""
    model, x = network(name)
    with torch.no_grad():
        assert torch.equal(create_feature_extractor(model, ["head"])(x)["head"], model(x))


# --------------------------------------------------------------------------- torch.jit


@pytest.mark.filterwarnings("ignore")  # sizes become constants; torch.jit is deprecated
@pytest.mark.parametrize("name", ["as-vit", *FAMILIES])
def test_jit_trace(name):
    """Equal numbers, on other images than those of the trace, too."""
    model, x = network(name)
    traced = torch.jit.trace(model, x)
    with torch.no_grad():
        for images in (x, x.flip(0) - 1.0):
            torch.testing.assert_close(traced(images), model(images), rtol=1e-5, atol=1e-6)  # GELU may be in a product


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["as-vit", *FAMILIES])
def test_onnx_by_a_trace(name, tmp_path):
    """The older exporter of torch, which knows no ops of ours, is refused in one line."""
    model, x = network(name)
    with pytest.raises(InputError, match=r"^torch.onnx.export\(..., dynamo=False\) does not know .*dynamo=True.*$"):
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.filterwarnings("ignore")
def test_jit_script():
    """As-ViT is scripted; an accelerated network is refused in one line, and stays as it was."""
    model, x = network("as-vit")
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    model, x = network("nest")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=r"^torch.jit.script .*asvit_fast.restore\(model\) first.*$"):
        torch.jit.script(model)
    assert [type(module) for module in model.modules()] == kinds
    torch.jit.script(af.restore(model))


# --------------------------------------------------------------------------- meta device


def test_named_model_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("asvit_small")
        assert model(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["as-vit", "as-vit with everything", "swin padded", "davit", "pvt_v2"])
@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
def test_meta_device(name, autocast):
    """Forward and backward; autocast of another device changes nothing."""
    with torch.device("meta"):
        if name.startswith("as-vit"):
            model, size = as_vit(**(EXTRAS if "everything" in name else {})), 76
        else:
            make, size, _ = MODELS[name]
            model = make().to("meta")
            assert af.accelerate(model).swapped
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(torch.randn(2, 3, size, size, device="meta"))
    assert output.device.type == "meta" and output.shape == (2, 3)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_taylor_on_the_meta_device():
    model = as_vit().to("meta").eval()
    x = torch.randn(2, 3, 64, 64, device="meta")
    assert [row.shape for row in af.jet(model, x, x, x)] == [(2, 3)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_the_processor_multiplies_is_no_part_of_a_trace(dtype: torch.dtype) -> None:
    """Not even where the trace is the first call of a process."""
    program = f"""
import torch
from torch import nn
import asvit_fast as af
model, x = nn.Sequential(nn.Linear(192, 768), nn.GELU()).to({dtype}).eval(), torch.randn(400, 192).to({dtype})
af.accelerate(model)
with torch.no_grad():
    traced = torch.jit.trace(model, x)
    assert (traced(x).float() - model(x).float()).abs().max() < 0.1
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
