"""A network as the backbone of detectors and of dense prediction: four maps, their norms, a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from ..errors import InputError
from ..settings import ImageSize, check_integer
from ..topology import Topology
from .bodies import STRIDES, Maps, make_body

LEVELS = ("0", "1", "2", "3")  # torchvision's names of the maps; its coarsest, "pool", is made of the last


class Backbone(nn.Module):
    """Images [B, 3, H, W] -> {"0": [B, out_channels, h, w], ..., "3", "pool"} with strides 4, 8, 16, 32, 64: the
    contract of torchvision's ``BackboneWithFPN``, whose names the weights have.

    Any height and width from 32 pixels; nothing is rebuilt when they change. ``backbone`` makes one.

    Attributes:
        body: the network without its classifier.
        channels: channels of its four maps.
        out_channels: channels of every map of the pyramid.
        frozen_stages: so many of its stages, and what comes before them, neither learn nor drop.
    """

    def __init__(self, body: nn.Module, maps: Maps, out_channels: int, norm: bool, frozen_stages: int) -> None:
        super().__init__()
        self.body = body
        self.channels, self.out_channels, self.frozen_stages = maps.channels, out_channels, frozen_stages
        self._maps = maps
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in maps.channels) if norm else None
        self.fpn = FeaturePyramidNetwork(list(maps.channels), out_channels, LastLevelMaxPool())
        self._freeze()

    def features(self, x: Tensor) -> list[Tensor]:
        """The normalised maps below the pyramid: images [B, 3, H, W] -> four [B, channels[i], h, w]."""
        maps = self._maps.of(self.body, x)
        if self.norms is None:
            return maps
        return [norm(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, one in zip(self.norms, maps, strict=True)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict(zip(LEVELS, self.features(x), strict=True)))

    def train(self, mode: bool = True) -> Backbone:
        """Training or evaluation mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self.body.modules() if self.frozen_stages else ():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations of the body again in the backward pass instead of keeping them.

        Raises:
            InputError: the network cannot (torchvision's cannot).
        """
        body: Any = self.body
        if not hasattr(body, "set_grad_checkpointing"):
            raise InputError("this backbone has no set_grad_checkpointing; take the network of timm of the same name")
        body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of what timm's optimizers keep from decaying."""
        body: Any = self.body
        return {f"body.{name}" for name in body.no_weight_decay()} if hasattr(body, "no_weight_decay") else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the body, for layer-wise decay (timm's contract); all else is one last layer.

        Raises:
            InputError: the network does not name its layers.
        """
        body: Any = self.body
        if not hasattr(body, "group_matcher"):
            raise InputError("this backbone does not name its layers: leave layer_decay out, or take timm's network")
        return _prefixed(body.group_matcher(coarse=coarse), "body")

    def _freeze(self) -> None:
        """Freeze what is registered up to the end of the last frozen stage: networks register in the order of use."""
        if not self.frozen_stages:
            return
        end = self._maps.levels[self.frozen_stages - 1] + "."
        named = list(self.body.named_parameters())
        last = max(index for index, (name, _) in enumerate(named) if name.startswith(end))
        for _, parameter in named[: last + 1]:
            parameter.requires_grad_(False)
        self.train(self.training)


def _prefixed(matcher: Any, prefix: str) -> Any:
    """timm's patterns of names, for names behind a prefix."""
    if isinstance(matcher, dict):
        return {name: _prefixed(one, prefix) for name, one in matcher.items()}
    if isinstance(matcher, (list, tuple)):
        return type(matcher)(_prefixed(one, prefix) for one in matcher)
    return matcher.replace("^", rf"^{prefix}\.") if isinstance(matcher, str) else matcher


def backbone(
    name_or_model: str | Topology | nn.Module,
    img_size: ImageSize | None = None,
    out_channels: int = 256,
    windows: str = "fixed",
    norm: bool = True,
    frozen_stages: int = 0,
    grad_checkpointing: bool = False,
    **options: Any,
) -> Backbone:
    """Make a backbone with a feature pyramid (As-ViT, arXiv 2202.11921, section 5.3; FPN, arXiv 1612.03144).

    Args:
        name_or_model: a topology, a name of timm or torchvision, or a network, which is copied: any with feature maps
            of strides 4, 8, 16 and 32.
        img_size: pixels that the weights were trained with, which an As-ViT's position embedding has the grid of, and
            its fixed windows the size: 28, 28, 14 and 7 tokens for 224. By default what the network was made for.
        out_channels: channels of the pyramid's maps.
        windows: of an As-ViT, "fixed" in tokens, or "split": as many to a side as the topology says, whatever the map.
            Windows of timm's Swin are fixed.
        norm: a LayerNorm on each map before the pyramid, as Swin's detectors have it.
        frozen_stages: so many stages, and the first projection, keep their weights; 0: all learn.
        grad_checkpointing: compute activations again in the backward pass instead of keeping them.
        options: arguments of the network, of a name (drop_path_rate, pos_embed, pretrained, ...).

    Raises:
        InputError: an unknown name, a network without these maps, a value out of its range.
    """
    check_integer("out_channels", out_channels, 1)
    check_integer("frozen_stages", frozen_stages, 0, len(STRIDES))
    body, maps = make_body(name_or_model, img_size, windows, **options)
    made = Backbone(body, maps, out_channels, norm, frozen_stages)
    if grad_checkpointing:
        made.set_grad_checkpointing()
    return made
