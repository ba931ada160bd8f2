"""Fewer tokens from the same weights, in our networks and in timm's: stride and dilation of the first projection
(As-ViT, arXiv 2202.11921, section 3.4).

Of timm's modules only plain attributes change, those that timm itself has for images of other sizes: wrappers, hooks,
deepcopy, pickle and compiled functions see the same modules. Every changed module keeps what its attributes were with
full tokens in one more attribute, ``SAVED_ATTRIBUTES``, until it gets them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Format, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..acceleration.timm_layers import FastPatchEmbed
from ..errors import InputError
from ..models import AsViT
from ..nn.patch_embed import dilation_of
from ..tokens import check_token_reduction

SAVED_ATTRIBUTES = "_with_full_tokens"
WINDOWED = (SwinTransformer, SwinTransformerV2)
# those whose position embedding follows the grid
POSITIONED = (VisionTransformer._pos_embed, VisionTransformerDistilled._pos_embed, Eva._pos_embed)
ONE_GRID = {
    "MlpMixer": "its layers mix a fixed number of tokens",
    "Beit": "its relative position biases belong to one grid",
    "VisionTransformerRelPos": "its relative position biases belong to one grid",
    "Cait": "its position embedding belongs to one grid",
}


def set_token_reduction(module: nn.Module, reduction: int) -> None:
    """Use 1, 2 or 4 times fewer tokens per side from now on, with the same weights, in every network of ``module``.

    Takes our AsViT, and timm's VisionTransformer (DeiT among them), Eva, SwinTransformer and SwinTransformerV2 whose
    ``patch_embed`` is a ``timm.layers.PatchEmbed`` of 2 x 2 pixels or more; also inside DistributedDataParallel,
    torch.compile, FSDP2, ModelEmaV3 and after ``asvit_fast.accelerate``.

    The first projection gets the stride K * r, the dilation round((r - 1) * K / (K - 1)) + 1 and zeros around the image
    so that the grid is ceil(image / stride); a position embedding is resampled; windows of a Swin Transformer that are
    larger than its maps shrink to the map, with the part of their position biases that belongs to them, and its masks
    are made for each map. With 1, everything is exactly as it was. The state_dict never changes.

    Set a timm network's input size while its tokens are full. A compiled function compiles once for every reduction.

    Raises:
        InputError: another reduction, or a network that cannot do it, with its class and the reason; nothing is changed
            then.

    Examples:
        >>> import timm, torch, asvit_fast as af
        >>> model = timm.create_model("test_vit").eval()
        >>> af.set_token_reduction(model, 2)  # half as many tokens per side
        >>> model.patch_embed.proj.stride, model.patch_embed.proj.dilation
        ((32, 32), (2, 2))
    """
    check_token_reduction(reduction)
    for network in _networks(module):
        if isinstance(network, AsViT):
            network.set_token_reduction(reduction)
        else:
            _restore(network)
            if reduction > 1:
                _reduce(network, reduction)


def token_reduction(module: nn.Module) -> int:
    """Return how many times fewer tokens per side the networks inside ``module`` have now.

    Raises:
        InputError: a network whose tokens cannot be reduced, or networks that differ.
    """
    reductions = {_reduction_of(network) for network in _networks(module)}
    if len(reductions) > 1:
        raise InputError(
            f"networks inside differ in token reduction, {sorted(reductions)}: use set_token_reduction on all"
        )
    return reductions.pop()


def unsupported_reason(module: nn.Module) -> str | None:
    """Say why ``set_token_reduction`` refuses ``module``; None if it takes it."""
    try:
        _networks(module)
    except InputError as error:
        return str(error)
    return None


# --------------------------------------------------------------------------- what is inside


def _networks(module: nn.Module) -> list[Any]:
    """The networks inside. Raises InputError if there is none, or one that cannot be reduced."""
    networks = [child for child in module.modules() if isinstance(child, AsViT) or _embeds_patches(child)]
    for network in networks:
        why = None if isinstance(network, AsViT) else _unsupported_reason(network)
        if why is not None:
            raise InputError(f"the tokens of {type(network).__name__} cannot be reduced: {why}")
    if not networks:
        raise InputError(
            f"the tokens of {type(module).__name__} cannot be reduced: it has no patch_embed; As-ViT and timm's "
            f"VisionTransformer, Eva, SwinTransformer and SwinTransformerV2 can be re-tokenized"
        )
    return networks


def _embeds_patches(module: nn.Module) -> bool:
    children = module._modules
    return "patch_embed" in children or any(isinstance(child, PatchEmbed) for child in children.values())


def _unsupported_reason(network: Any) -> str | None:
    follows_grid = isinstance(network, WINDOWED) or getattr(type(network), "_pos_embed", None) in POSITIONED
    if not follows_grid:
        return ONE_GRID.get(type(network).__name__, "it is not known to work on any grid but its own")
    embed = network.patch_embed
    if type(embed).forward not in (PatchEmbed.forward, FastPatchEmbed.forward):
        return f"its patch_embed is a {type(embed).__name__}, not a timm.layers.PatchEmbed"
    projection = embed.proj
    if not isinstance(projection, nn.Conv2d):
        return f"the proj of its patch_embed is a {type(projection).__name__}, not a Conv2d"
    kernel = projection.kernel_size
    if min(kernel) < 2:
        return f"its patches of {kernel[0]} x {kernel[1]} pixels have nothing to dilate"
    if _full(projection, "stride") != kernel or _full(projection, "dilation") != (1, 1) or projection.padding != (0, 0):
        return f"its patches are not side by side: {projection}"
    rotary = getattr(network, "rope", None)
    if getattr(rotary, "feat_shape", None) is not None:
        return "its rotary position embedding belongs to one grid: create it with dynamic_img_size=True"
    return None


def _reduction_of(network: Any) -> int:
    embed = network.patch_embed
    if isinstance(network, AsViT):
        return embed.stride // embed.base_stride
    return embed.proj.stride[0] // embed.proj.kernel_size[0]


# --------------------------------------------------------------------------- networks of timm


def _change(module: nn.Module, **values: Any) -> None:
    kept = vars(module).setdefault(SAVED_ATTRIBUTES, {})
    for name, value in values.items():
        kept[name] = getattr(module, name)
        setattr(module, name, value)


def _full(module: nn.Module, name: str) -> Any:
    """The value of an attribute with full tokens."""
    return vars(module).get(SAVED_ATTRIBUTES, {}).get(name, getattr(module, name))


def _restore(network: nn.Module) -> None:
    for module in network.modules():
        kept = vars(module).pop(SAVED_ATTRIBUTES, {})
        for name, value in kept.items():
            setattr(module, name, value)
        if "window_size" in kept and "relative_position_index" in module._buffers:
            _set_position_index(module, kept["window_size"])


def _reduce(network: Any, reduction: int) -> None:
    """Reduce the tokens of a network that has full ones."""
    embed = network.patch_embed
    projection = embed.proj
    kernel = projection.kernel_size
    stride = tuple(side * reduction for side in kernel)
    dilation = tuple(dilation_of(side, reduction) for side in kernel)
    beyond = [max(d * (k - 1) + 1 - s, 0) for d, k, s in zip(dilation, kernel, stride, strict=True)]
    _change(projection, stride=stride, dilation=dilation)
    if any(beyond):  # Conv2d pads by F.pad, which can be asymmetric, for every mode but "zeros"
        zeros = [side for pixels in reversed(beyond) for side in (pixels // 2, pixels - pixels // 2)]
        _change(projection, padding_mode="constant", _reversed_padding_repeated_twice=zeros)
    _change(embed, patch_size=stride, dynamic_img_pad=True)
    if isinstance(network, WINDOWED):
        _reduce_windows(network, [-(-size // step) for size, step in zip(embed.img_size, stride, strict=True)])
    elif not network.dynamic_img_size:
        _change(network, dynamic_img_size=True)
        _change(embed, flatten=False, output_fmt=Format.NHWC)


def _reduce_windows(network: Any, size: Sequence[int]) -> None:
    """Fit the windows of a Swin Transformer whose first map has ``size`` (rows, columns) at its own image size; images
    of other sizes run too, with padding."""
    for stage in network.layers:
        if not isinstance(stage.downsample, nn.Identity):
            size = [-(-side // 2) for side in size]
        for block in stage.blocks:
            _reduce_window(block, size)


def _reduce_window(block: Any, size: Sequence[int]) -> None:
    attention, window, shift = block.attn, block.attn.window_size, block.shift_size
    if not block.always_partition:
        window = tuple(map(min, size, window))
        shift = tuple(
            0 if side <= length else by for side, length, by in zip(size, window, shift, strict=True)
        )  # a single window is not shifted
    area = window[0] * window[1]
    _change(block, dynamic_mask=True, window_size=window, window_area=area, shift_size=shift)
    if window != attention.window_size:
        full = attention.window_size
        _change(attention, window_size=window)
        if hasattr(attention, "window_area"):
            _change(attention, window_area=area)
        _set_position_index(attention, full)


def _set_position_index(attention: Any, full: tuple[int, int]) -> None:
    """Index, of the position biases of ``full`` windows, those between the tokens of the present ones."""
    device = attention.relative_position_index.device

    def offsets(length: int, largest: int) -> Tensor:
        position = torch.arange(length, device=device)
        return position.unsqueeze(1) - position.unsqueeze(0) + largest - 1  # [length, length]

    height, width = attention.window_size
    rows, columns = offsets(height, full[0]), offsets(width, full[1])
    index = rows[:, None, :, None] * (2 * full[1] - 1) + columns[None, :, None, :]  # [h, w, h, w]
    attention.relative_position_index = index.reshape(height * width, height * width)
