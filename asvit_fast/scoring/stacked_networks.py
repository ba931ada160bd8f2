"""Networks of one topology, run together: a layer of all of them is one batched product.

Launches then do not grow with the number of networks, and small layers fill a GPU. The networks are those that scores
draw: without position embedding and classifier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.gelu_taylor import gelu_taylor
from ..ops.layer_norm_taylor import layer_norm_taylor
from ..ops.window_attention_taylor import stacked_window_attention
from ..topology import EMBED_STRIDE, Topology
from .patch_merge import neighbourhoods
from .stacked_weights import StackedWeights

EPS = 1e-5  # of the LayerNorms
MERGE_STRIDE = 2


class StackedNetworks(ABC):
    """The way of a feature map through the stages; subclasses say how it lies in memory and what a layer does."""

    def __init__(self, topology: Topology, weights: StackedWeights) -> None:
        self.topology = topology
        self.weights = weights
        self.networks = weights["patch_embed.proj.weight"].shape[0]

    def through_stages(self, x: Tensor) -> Tensor:
        """Embedded tokens -> the last stage's, which the scored features are the mean of."""
        for i, stage in enumerate(self.topology.stages):
            if i:
                x = self.merge(x, f"stages.{i}.downsample", stage.kernel)
            for j in range(stage.depth):
                block, heads = f"stages.{i}.blocks.{j}", self.topology.stage_heads[i]
                x = self.attend(x, block, heads, stage.splits)
                x = self.expand(x, block)
        return x

    @abstractmethod
    def merge(self, x: Tensor, name: str, kernel: int) -> Tensor:
        """Patch merging."""

    @abstractmethod
    def attend(self, x: Tensor, block: str, heads: int, splits: int) -> Tensor:
        """x + Attention(norm(x))."""

    @abstractmethod
    def expand(self, x: Tensor, block: str) -> Tensor:
        """x + Mlp(norm(x))."""

    def windows(self, size: Sequence[int], splits: int) -> list[int]:
        """Tokens along the two sides of a window of a map."""
        return [-(-side // splits) for side in size]


class StackedCurves(StackedNetworks):
    """The circle of each network pushed through it: maps [orders + 1, n, H, W, networks*C], the channels of the
    networks side by side, as if they were one network whose products have groups. Records no gradients, and works in
    place.

    ``norms``: whether the networks keep their LayerNorms.
    """

    def __init__(self, topology: Topology, weights: StackedWeights, norms: bool) -> None:
        super().__init__(topology, weights)
        self.norms = norms

    def features(self, circles: Tensor, mix: Tensor) -> Tensor:
        """circles [networks, 2, channels, H, W], each one's u0 and u1; mix [orders + 1, n, 3], how much of u0, of u1,
        and of what does not move (1 in order 0), is in every order at every point -> [orders + 1, n, networks, F]."""
        x = self.through_stages(self.embed(circles, mix))
        return x.mean((2, 3)).unflatten(-1, (self.networks, -1))

    def embed(self, circles: Tensor, mix: Tensor) -> Tensor:
        """The projection is linear: of u0 and u1, which are then mixed with its bias."""
        weight, bias = self.weights["patch_embed.proj.weight"], self.weights["patch_embed.proj.bias"]
        images = circles.permute(0, 1, 3, 4, 2).flatten(0, 1)  # [networks*2, H, W, Cin]
        patches = neighbourhoods(images, self.topology.stages[0].kernel, EMBED_STRIDE)  # [.., Ho, Wo, K, K, Cin]
        size = patches.shape[1:3]
        basis = weight.new_empty(3, *size, self.networks, weight.shape[1])
        rows = patches.reshape(self.networks, -1, weight.shape[2])  # [networks, 2*Ho*Wo, K*K*Cin]
        torch.bmm(rows, weight.mT, out=basis[:2].flatten(0, 2).transpose(0, 1))
        basis[2] = bias
        x = (mix.flatten(0, 1) @ basis.flatten(1)).reshape(*mix.shape[:2], *size, -1)
        return self._norm(x, "patch_embed.norm")

    def merge(self, x: Tensor, name: str, kernel: int) -> Tensor:
        maps = self._groups(x).flatten(0, 1)  # [(orders + 1)*n, H, W, networks, C]
        patches = neighbourhoods(maps, kernel, MERGE_STRIDE)  # [.., Ho, Wo, networks, K, K, C]
        rows = patches.flatten(3).unflatten(0, x.shape[:2])  # [orders + 1, n, Ho, Wo, networks*K*K*C]
        return self._product(self._norm(rows, f"{name}.norm"), f"{name}.reduction")

    def attend(self, x: Tensor, block: str, heads: int, splits: int) -> Tensor:
        qkv = self._product(self._norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        self._add_bias(qkv, f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (self.networks * heads, 3, -1)).unbind(-2)  # [orders + 1, n, H, W, heads, d]
        window = self.windows(x.shape[2:4], splits)
        out = stacked_window_attention(q, k, v, window, [0, 0], None, q.shape[-1] ** -0.5)
        return self._add_linear(x, out, f"{block}.attn.proj")

    def expand(self, x: Tensor, block: str) -> Tensor:
        hidden = self._product(self._norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        bias = self.weights.get(f"{block}.mlp.fc1.bias")
        hidden = gelu_taylor(hidden, "none", None if bias is None else bias.flatten())
        return self._add_linear(x, hidden, f"{block}.mlp.fc2")

    def _groups(self, x: Tensor) -> Tensor:
        """[..., networks*C] -> [..., networks, C], the same memory."""
        return x.unflatten(-1, (self.networks, -1))

    def _rows(self, x: Tensor) -> Tensor:
        """[..., networks*C] -> [networks, rows, C], the same memory."""
        return self._groups(x).flatten(0, -3).transpose(0, 1)

    def _product(self, x: Tensor, name: str) -> Tensor:
        """Linear without its bias."""
        weight = self.weights[f"{name}.weight"]  # [networks, N, K]
        out = x.new_empty(*x.shape[:-1], self.networks * weight.shape[1])
        torch.bmm(self._rows(x), weight.mT, out=self._rows(out))
        return out

    def _add_linear(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """x += Linear(y)."""
        self._rows(x).baddbmm_(self._rows(y), self.weights[f"{name}.weight"].mT)
        self._add_bias(x, name)
        return x

    def _add_bias(self, x: Tensor, name: str) -> None:
        """To the value: it does not move."""
        bias = self.weights.get(f"{name}.bias")  # [networks, C]
        if bias is not None:
            x[0].add_(bias.flatten())

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if not self.norms:
            return x
        y = layer_norm_taylor(self._groups(x), eps=EPS).flatten(-2)
        weight = self.weights.get(f"{name}.weight")
        if weight is not None:
            y.mul_(weight.flatten())
        self._add_bias(y, name)
        return y
