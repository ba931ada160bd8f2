"""torch.onnx.export(dynamo=True) of our networks and of accelerated ones, as they are; ONNX Runtime runs the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_accelerate_families import MODELS, image, prepared
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.graph import save_onnx

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

TOPOLOGY = "8,2,2|2,1,2|2,1,2|2,1,2|16"
DYNAMIC = ({0: torch.export.Dim("batch")},)


def network(name: str) -> tuple[nn.Module, Tensor]:
    """In evaluation, and images [2, 3, H, W]."""
    if name == "as-vit":
        extras = {"pos_embed": "absolute", "attn_scale": True, "feat_scale": True}
        return prepared(lambda: af.create_model(TOPOLOGY, img_size=64, num_classes=3, **extras)).eval(), image(76)
    make, size, _ = MODELS[name]
    model = prepared(make).eval()
    assert af.accelerate(model).swapped
    return model, image(size)


def run(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def check(name: str, path: Path, program: bool = False) -> None:
    """A file made of images of one batch size gives the network's numbers on others."""
    model, images = network(name)
    with torch.no_grad():
        if program:
            exported = torch.export.export(model, (images,), dynamic_shapes=DYNAMIC)
            torch.onnx.export(exported, f=path, dynamo=True, verbose=False)
        else:
            torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
        for batch in (images, torch.cat([images, images.flip(0) - 0.5, images[:1]])):
            torch.testing.assert_close(run(path, batch), model(batch), rtol=1e-4, atol=1e-5)


def test_as_vit(tmp_path):
    check("as-vit", tmp_path / "network.onnx")


def test_accelerated(tmp_path):
    check("swin padded", tmp_path / "network.onnx")


def test_exported_program(tmp_path):
    """torch.export keeps our ops, which ONNX replaces."""
    check("pvt_v2", tmp_path / "network.onnx", program=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("swin padded", "pvt_v2")])
def test_every_family(name, tmp_path):
    check(name, tmp_path / "network.onnx")


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_large_products(tmp_path):
    """Those of ops.linear, with and without its activation."""
    from asvit_fast import ops

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(96, 320)), nn.Parameter(torch.randn(96))

        def forward(self, x: Tensor) -> Tensor:
            return ops.linear(x, self.weight, self.bias, "gelu") - ops.linear(x, self.weight)

    model, x = Products(), torch.randn(2, 200, 320)
    with torch.no_grad():
        torch.onnx.export(model, (x,), tmp_path / "product.onnx", dynamo=True, verbose=False)
        torch.testing.assert_close(run(tmp_path / "product.onnx", x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_taylor_ops(tmp_path):
    """Values and derivatives."""
    from asvit_fast import ops

    class Rules(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = ops.layer_norm_taylor(ops.tanh_taylor(x))
            return ops.softmax_taylor(ops.gelu_taylor(x)) + ops.window_attention_taylor(
                torch.cat([x] * 3, -1), 2, (2, 3)
            )

    x = torch.randn(3, 2, 4, 5, 8)
    torch.onnx.export(Rules(), (x,), tmp_path / "rules.onnx", dynamo=True, verbose=False)
    torch.testing.assert_close(run(tmp_path / "rules.onnx", x), Rules()(x), rtol=1e-4, atol=1e-5)


class FusedAttention(nn.Module):
    """Torch's attention with a bias, as transformers call it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.table = nn.Parameter(torch.randn(169, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # [B, 49, 64]
        q, k, v = (layer(x).view(x.shape[0], -1, 2, 32).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table[torch.arange(49 * 49) % 169].view(49, 49, 2).permute(2, 0, 1).contiguous()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])  # [B, 2, 49, 32]
        return y.transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1).mean(1)


def test_attention_of_torch(tmp_path):
    """With weights that need gradients, as they have after training."""
    model = FusedAttention().eval()
    save_onnx(model, tmp_path / "network.onnx", {"input_size": (64, 7, 7)})
    images = torch.randn(3, 64, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "network.onnx", images), model(images), rtol=1e-4, atol=1e-5)
