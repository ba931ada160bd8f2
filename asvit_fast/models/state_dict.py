"""Weights of other code and other sizes, brought into the form of our network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..nn.position_embedding import resample_position_embedding
from ..settings import check_kind

# The authors' names (VITA-Group/AsViT) -> ours. Their patch merging closes a stage, ours opens the next.
_RENAME = (
    (r"^absolute_pos_embed$", "pos_embed"),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.mlps\.0\.0\.", r"stages.\1.blocks.\2.norm2."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.mlps\.0\.1\.", r"stages.\1.blocks.\2.mlp."),
    (r"^layers\.", "stages."),
    (r"^head\.0\.", "head.fc1."),
    (r"^head\.2\.", "head.fc2."),
)


def convert_asvit_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the authors' network (VITA-Group/AsViT) under our names; a dict already in our form comes back as it
    is.

    Args:
        state_dict: of their Transformer, with or without LayerNorms and position embedding.

    Raises:
        InputError: no state dict, or the position embedding is not that of a square grid.

    Examples:
        >>> import asvit_fast as af
        >>> model = af.create_model("asvit_seed", img_size=64)
        >>> weights = af.convert_asvit_state_dict(model.state_dict())  # or torch.load("theirs.pth", weights_only=True)
        >>> model.load_state_dict(weights)
        <All keys matched successfully>
    """
    check_kind("state_dict", state_dict, Mapping, "a state dict: names and tensors")
    converted = {}
    for name, value in state_dict.items():
        if value is None or name.endswith("attn_mask"):  # a persistent buffer of theirs, without content
            continue
        for pattern, replacement in _RENAME:
            new_name, hits = re.subn(pattern, replacement, name)
            if hits:
                name = new_name
                break
        if name == "pos_embed" and value.ndim == 3:
            side = math.isqrt(value.shape[1])
            if side * side != value.shape[1]:
                raise InputError(f"absolute_pos_embed holds {value.shape[1]} tokens, which is no square grid")
            value = value.reshape(1, side, side, value.shape[2])  # [1, tokens, C] -> [1, side, side, C]
        converted[name] = value
    return converted


def drop_norms(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that remain in a network without norms."""
    return {name: value for name, value in state_dict.items() if not re.search(r"(^|\.)norm\d?\.", name)}


def fit_state_dict(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """A checkpoint of ours or of the authors' made to fit ``model``: names converted, position embedding resampled."""
    converted = convert_asvit_state_dict(state_dict.get("state_dict", state_dict))
    if model.pos_embed is None:
        converted.pop("pos_embed", None)
    elif "pos_embed" in converted and converted["pos_embed"].shape != model.pos_embed.shape:
        converted["pos_embed"] = resample_position_embedding(converted["pos_embed"], model.grid_size)
    return converted
