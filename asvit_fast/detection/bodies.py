"""Feature maps of strides 4, 8, 16 and 32 out of any network that has them: ours, timm's, torchvision's."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.dla import DLA
from timm.models.hrnet import HighResolutionNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter

from ..errors import InputError, one_line
from ..models import AsViT
from ..models.library import check_known, create_by_name, module_of, takes_size
from ..modes import evaluation_mode
from ..settings import ImageSize, check_choice, image_sides
from ..topology import Topology

STRIDES = (4, 8, 16, 32)
WINDOWS = ("fixed", "split")
WINDOWED = tuple(f"timm.models.swin_transformer{version}" for version in ("", "_v2", "_v2_cr"))
ANY_SIZE = {"strict_img_size": False, "always_partition": True}  # of these: masks by map, windows as they are
WHOLE: dict[int, tuple[type[nn.Module], ...]] = {  # networks of timm that take sides of such multiples only
    STRIDES[0]: (SwinTransformer, SwinTransformerV2),  # whole patches
    STRIDES[-1]: (DLA, HighResolutionNet),  # which add maps of several strides
}
PROBE = (128, 192)  # pixels: sides that tell rows from columns, and both from channels


@dataclass(frozen=True)
class Maps:
    """How the maps of a network are had: images [B, C, H, W] -> four maps [B, C_i, h, w] of strides 4, 8, 16, 32.

    ``channels`` are C_1 to C_4; ``levels`` the names of the modules that end them; ``patch``: pixels that the sides
    must be multiples of. Other images are padded, and what is of the padding alone is cut off the maps.
    """

    channels: tuple[int, ...]
    levels: tuple[str, ...]
    patch: int = 1

    def of(self, network: Any, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        below, right = -height % self.patch, -width % self.patch
        if not (below or right):
            return self._of(network, x)
        maps = self._of(network, F.pad(x, (0, right, 0, below)))
        sides = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
        return [one[:, :, :rows, :columns] for one, (rows, columns) in zip(maps, sides, strict=True)]

    def _of(self, network: Any, x: Tensor) -> list[Tensor]:
        """The maps of a network that returns all of them in order."""
        maps = network(x)
        return list(maps.values()) if isinstance(maps, dict) else maps


class ChannelsLastMaps(Maps):
    """Of a network whose maps are [B, h, w, C_i]."""

    def _of(self, network: Any, x: Tensor) -> list[Tensor]:
        return [one.permute(0, 3, 1, 2) for one in super()._of(network, x)]


@dataclass(frozen=True)
class Intermediates(Maps):
    """Of a network with timm's ``forward_intermediates``."""

    indices: tuple[int, ...] = ()

    def _of(self, network: Any, x: Tensor) -> list[Tensor]:
        indices = list(self.indices)
        if isinstance(network, AsViT):  # channels last in memory, as the norms want them
            maps = network.forward_intermediates(
                x, indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
            )
            return [one.permute(0, 3, 1, 2) for one in maps]
        return network.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)


def make_body(
    what: str | Topology | nn.Module, img_size: ImageSize | None, windows: str, **options: Any
) -> tuple[nn.Module, Maps]:
    """A network without its classifier, and how its maps are had; see ``backbone`` for the arguments.

    A network that is given is copied.

    Raises:
        InputError: an unknown name, a network without these four strides, windows that it has not.
    """
    check_choice("windows", windows, WINDOWS)
    network, name = create(what, img_size, **options)
    if windows == "split" and not isinstance(network, AsViT):
        raise InputError(f"windows='split' is As-ViT's; the windows of {name} are fixed: leave windows out")
    if isinstance(network, AsViT):
        sides = network.img_size if img_size is None else image_sides(img_size)
        return _of_asvit(network, sides, windows)
    if hasattr(network, "feature_info"):
        return _of_timm(network, name, options)
    return _of_chain(network, name)


def create(what: str | Topology | nn.Module, img_size: ImageSize | None, **options: Any) -> tuple[nn.Module, str]:
    """The whole network, for images of any size, and its name."""
    if isinstance(what, nn.Module):
        if options:
            raise InputError(f"{', '.join(options)}: a network that is made already takes no arguments")
        return copy.deepcopy(what), type(what).__name__
    if not isinstance(what, (str, Topology)):
        raise InputError(f"a backbone is made of a topology, a name or a network, got {type(what).__name__}")
    if isinstance(what, Topology) or "|" in what:
        options["topology"], what = str(Topology.parse(what)), "asvit"
    check_known(what)
    if img_size is not None and takes_size(what):
        options.setdefault("img_size", image_sides(img_size))
    options = {**any_size(what), **options}
    try:
        network = create_by_name(what, **options)
    except TypeError as error:
        raise InputError(f"{what} cannot be made with these arguments: {one_line(error)}") from error
    if takes_size(what) and not (isinstance(network, AsViT) or any_size(what)):
        raise InputError(f"{what} takes images of one size only; give a network for any, such as asvit_small")
    return network, what


def any_size(name: str) -> dict[str, Any]:
    """Arguments with which a Swin of timm takes images of any size and keeps its windows."""
    return dict(ANY_SIZE) if timm.is_model(name) and module_of(name).__name__ in WINDOWED else {}


def _of_asvit(network: AsViT, sides: tuple[int, int], windows: str) -> tuple[nn.Module, Maps]:
    """Windows of so many tokens as images of ``sides`` pixels have in them, or that follow the map."""
    stages = network.topology.stages
    grids = [[math.ceil(side / stride) for side in sides] for stride in STRIDES]
    fixed = [tuple(math.ceil(side / stage.splits) for side in grid) for stage, grid in zip(stages, grids, strict=True)]
    network._set_windows(fixed if windows == "fixed" else None)
    for name in ("norm", "head"):  # the maps have norms of their own
        setattr(network, name, nn.Identity())
    return network, _intermediates(network.feature_info, range(len(stages)))


def _of_timm(network: Any, name: str, options: dict[str, Any]) -> tuple[nn.Module, Maps]:
    infos = [dict(info) for info in network.feature_info]
    found = {info["reduction"]: index for index, info in enumerate(infos)}  # the last of each stride
    if not set(STRIDES) <= set(found):
        strides = ", ".join(map(str, dict.fromkeys(info["reduction"] for info in infos)))
        raise InputError(
            f"{name} has feature maps of strides {strides}, a pyramid needs {', '.join(map(str, STRIDES))}; give a "
            "hierarchical network such as asvit_small, swin_tiny_patch4_window7_224 or resnet50"
        )
    indices = [found[stride] for stride in STRIDES]
    patch = next((pixels for pixels, kinds in WHOLE.items() if isinstance(network, kinds)), 1)
    if not hasattr(network, "forward_intermediates"):
        if not timm.is_model(name):
            raise InputError(f"{name} has no forward_intermediates; give its name in timm")
        listed: Any = timm.create_model(name, features_only=True, out_indices=indices, **any_size(name), **options)
        levels = tuple(module.replace(".", "_") for module in listed.feature_info.module_name())
        return listed, Maps(tuple(listed.feature_info.channels()), levels, patch)
    network.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    return network, _intermediates(infos, indices, patch)


def _intermediates(infos: Sequence[dict[str, Any]], indices: Iterable[int], patch: int = 1) -> Intermediates:
    chosen = [infos[index] for index in indices]
    channels, levels = (tuple(info[key] for info in chosen) for key in ("num_chs", "module"))
    return Intermediates(channels, levels, patch, tuple(indices))


def _of_chain(network: nn.Module, name: str) -> tuple[nn.Module, Maps]:
    """By the sizes of the maps that a probe leaves: the last module at each stride ends its level."""
    chain = nn.Sequential(OrderedDict(_children(network)))
    levels: dict[int, tuple[str, tuple[int, ...]]] = {}
    x = torch.zeros(1, 3, *PROBE)  # [1, 3, H, W]
    with evaluation_mode(chain), torch.no_grad():
        for child, module in chain.named_children():
            try:
                x = module(x)
            except Exception:  # the classifier, which wants what its network does to the maps before it
                break
            sides = {tuple(x.shape[2:]), tuple(x.shape[1:3])} if isinstance(x, Tensor) and x.dim() == 4 else set()
            for stride in STRIDES:
                if tuple(side // stride for side in PROBE) in sides:
                    levels[stride] = (child, tuple(x.shape))
    if not set(STRIDES) <= set(levels):
        strides = ", ".join(map(str, levels)) or "none"
        raise InputError(f"{name} has feature maps of strides {strides} of {STRIDES}; give a hierarchical network")
    channels_last = levels[4][1][1:3] == tuple(side // 4 for side in PROBE)
    axis = 3 if channels_last else 1
    names = tuple(levels[stride][0] for stride in STRIDES)
    channels = tuple(levels[stride][1][axis] for stride in STRIDES)
    maps = (ChannelsLastMaps if channels_last else Maps)(channels, names)
    return IntermediateLayerGetter(chain, {name: name for name in names}), maps


def _children(network: nn.Module) -> dict[str, nn.Module]:
    """What runs one after the other, with torchvision's names of it."""
    features = getattr(network, "features", None)
    if isinstance(features, nn.Sequential):
        return dict(features.named_children())
    children = dict(network.named_children())
    trunk = children.pop("trunk_output", None)  # RegNet
    return {"stem": children["stem"], **dict(trunk.named_children())} if trunk is not None else children
