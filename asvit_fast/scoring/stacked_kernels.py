"""Neural tangent kernels of networks of one topology, in one forward and one backward pass of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.window_attention import window_attention
from ..topology import EMBED_STRIDE
from .patch_merge import Neighbourhoods, neighbourhoods
from .stacked_networks import EPS, MERGE_STRIDE, StackedNetworks


class Grams:
    """The sum of Gram matrices [networks, B, B], float64, of the gradients of one parameter after the other."""

    def __init__(self, networks: int, images: Tensor) -> None:
        self.total = images.new_zeros(networks, len(images), len(images), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """rows [networks, B, parameter]: sums in float32 would blur the small eigenvalues."""
        rows = rows.double()
        self.total.baddbmm_(rows, rows.mT)

    def add_product(self, x: Tensor, gradient: Tensor) -> None:
        """Of a product's weight: its inputs x [networks, B, T, K], the gradient of its outputs [networks, B, T, N]."""
        networks, samples, tokens, inputs = x.shape
        outputs = gradient.shape[3]
        if samples * tokens * (inputs + outputs) >= 2 * inputs * outputs:
            rows = torch.bmm(gradient.flatten(0, 1).mT, x.flatten(0, 1))  # [networks*B, N, K]
            self.add(rows.view(networks, samples, -1))
            return
        # few tokens meet a large weight: products of pairs of them
        x, gradient = (a.flatten(1, 2).double() for a in (x, gradient))  # [networks, B*T, ...]
        pairs = torch.bmm(x, x.mT).mul_(torch.bmm(gradient, gradient.mT))
        self.total += pairs.view(networks, samples, tokens, samples, tokens).sum((2, 4))


class _Product(torch.autograd.Function):
    """x [networks, B, ..., K], weight [networks, N, K] -> [networks, B, ..., N]; backward adds to ``grams``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grams: Grams) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grams = grams
        return torch.bmm(x.flatten(1, -2), weight.mT).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        ctx.grams.add_product(x.flatten(2, -2), gradient.flatten(2, -2))
        return torch.bmm(gradient.flatten(1, -2), weight).view(x.shape), None, None


class _Scale(torch.autograd.Function):
    """x [networks, B, ..., C] times weight [networks, C] (None: ones); its backward pass adds to ``grams``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, grams: Grams) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grams = grams
        return x.view_as(x) if weight is None else x * _per_channel(weight, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.grams.add((gradient * x).flatten(2, -2).sum(2))
        return gradient if weight is None else gradient * _per_channel(weight, gradient), None, None


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """vector [networks, C] in the dimensions of x [networks, ..., C]."""
    return vector.view(len(vector), *[1] * (x.dim() - 2), -1)


class StackedKernels(StackedNetworks):
    """Maps [networks, B, H, W, C]. As ``ntk_gram`` with the parameters "weights": the backward pass of a layer forms
    the gradients of all samples, adds their products, and forgets them."""

    def grams(self, images: Tensor) -> Tensor:
        """images [B, channels, H, W], the same for all networks -> Gram matrices [networks, B, B], float64."""
        self.sums = Grams(self.networks, images)
        weight, bias = self.weights["patch_embed.proj.weight"], self.weights["patch_embed.proj.bias"]
        patches = neighbourhoods(images.permute(0, 2, 3, 1), self.topology.stages[0].kernel, EMBED_STRIDE)
        size, rows = patches.shape[:3], patches.view(1, -1, weight.shape[2])  # [1, B*Ho*Wo, K*K*Cin]
        rows = rows.expand(self.networks, -1, -1)
        tokens = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)  # [networks, B*Ho*Wo, C]
        with torch.enable_grad():
            embedded = tokens.view(self.networks, *size, -1).requires_grad_()
            x = self.through_stages(self._norm(embedded, "patch_embed.norm"))
            features = x.mean((2, 3))  # [networks, B, F]
            (gradient,) = torch.autograd.grad(features.sum(), embedded)
        self.sums.add_product(rows.unflatten(1, (len(images), -1)), gradient.flatten(2, 3))
        return self.sums.total

    def merge(self, x: Tensor, name: str, kernel: int) -> Tensor:
        patches = Neighbourhoods.apply(x.flatten(0, 1), kernel, MERGE_STRIDE)  # [networks*B, Ho, Wo, K, K, C]
        rows = patches.flatten(3).unflatten(0, x.shape[:2])  # [networks, B, Ho, Wo, K*K*C]
        return self._product(self._norm(rows, f"{name}.norm"), f"{name}.reduction")

    def attend(self, x: Tensor, block: str, heads: int, splits: int) -> Tensor:
        qkv = self._query_key_value(self._norm(x, f"{block}.norm1"), f"{block}.attn.qkv", heads)
        window = self.windows(x.shape[2:4], splits)
        out = window_attention(qkv.flatten(0, 1), heads, (window[0], window[1]))  # [networks*B, H, W, heads*d]
        return x + self._product(out.unflatten(0, x.shape[:2]), f"{block}.attn.proj")

    def expand(self, x: Tensor, block: str) -> Tensor:
        hidden = F.gelu(self._product(self._norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        return x + self._product(hidden, f"{block}.mlp.fc2")

    def _query_key_value(self, x: Tensor, name: str, heads: int) -> Tensor:
        """[networks, B, H, W, 3*heads*d]: rows of the weight back in the order [3, heads, d]."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

        def reordered(parameter: Tensor) -> Tensor:
            return parameter.unflatten(1, (heads, 3, -1)).transpose(1, 2).flatten(1, 3)

        return self._affine(x, reordered(weight), None if bias is None else reordered(bias))

    def _product(self, x: Tensor, name: str) -> Tensor:
        return self._affine(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _Product.apply(x, weight, self.sums)
        return y if bias is None else y + _per_channel(bias, y)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        y = _Scale.apply(F.layer_norm(x, x.shape[-1:], eps=EPS), self.weights.get(f"{name}.weight"), self.sums)
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + _per_channel(bias, y)
