"""Our backbones in mmdetection: https://github.com/open-mmlab/mmdetection. Importing this module registers them.

custom_imports = dict(imports=["asvit_fast.detection.mmdet"])
model = dict(backbone=dict(type="AsViTFast", name="asvit_small"), neck=dict(in_channels=[88, 176, 352, 704]), ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..errors import InputError
from .backbone import backbone
from .bodies import STRIDES


@MODELS.register_module()
class AsViTFast(BaseModule):
    """Images [B, 3, H, W] -> the normalised maps of strides 4, 8, 16, 32 as a tuple; the pyramid is mmdet's neck.

    Args:
        name: a topology, or a name of timm or torchvision.
        out_indices: which of the four maps; those of a neck's start_level and above leave no weights unused.
        frozen_stages: so many stages keep their weights; 0, or mmdet's -1, none.
        with_cp: compute activations again in the backward pass.
        init_cfg: mmengine's initialisation; its checkpoints are of this module or of a detector with it.
        options: the other arguments of ``asvit_fast.detection.backbone`` (windows, drop_path_rate, ...);
            ``checkpoint_path`` are weights of a classifier to start from.

    Attributes:
        channels: channels of its maps, the neck's in_channels.

    Raises:
        InputError: as ``asvit_fast.detection.backbone``, and for maps that there are not.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        init_cfg: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(init_cfg)
        levels = range(len(STRIDES))
        if not out_indices or list(out_indices) != [index for index in levels if index in out_indices]:
            raise InputError(f"out_indices must be some of 0, 1, 2, 3 in this order, got {out_indices!r}")
        frozen_stages = 0 if frozen_stages == -1 else frozen_stages
        self.maps = backbone(name, frozen_stages=frozen_stages, grad_checkpointing=with_cp, **options)
        self.out_indices = tuple(out_indices)
        self.channels = [self.maps.channels[index] for index in self.out_indices]
        # weights that nobody uses stop DistributedDataParallel
        del self.maps.fpn
        if self.maps.norms is not None:
            for index in set(levels) - set(out_indices):
                self.maps.norms[index] = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.maps.features(x)
        return tuple(maps[index] for index in self.out_indices)
