"""Replacements for the modules of As-ViT's original code (arXiv 2202.11921), VITA-Group/AsViT."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from ..ops.patch_merge import patch_merge
from ..ops.window_attention import window_attention
from .computing import drop_probability, drops, project, window_dropout
from .embedding import convolution_reason
from .replacement import DROP, LINEAR, SOFTMAX, Parts, bypass_reason
from .shifts import mask_reason, window_reason
from .structure import Structural, Structure

MAYBE_NORM = (nn.LayerNorm, nn.Identity)  # switch_norm exchanges them


def _norm(norm: Any) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias, eps of a LayerNorm; no weight for an Identity or None."""
    return (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, None, 1e-5)


FILE = "VITA-Group/AsViT lib/models"


class FastAuthorsTransformerBlock(Structural):
    """Tokens [B, H*W, C]; computes the attention of whole maps with the weights of its `attn`."""

    ops = ("window_attention",)

    origin = f"{FILE}/cell_operations.py: TransformerBlock"
    structure: ClassVar[Structure] = {
        "": {"forward": ("6df0155108626bb0",)},
        "attn": {"forward": ("75e220575783d891",)},
        "attn.mat": {"forward": ("87d2978b742fac31",)},
    }
    reads = (
        *("input_resolution", "window_size", "shift_size", "attn_mask", "norm1", "mlps", "drop_path"),
        *("attn.num_heads", "attn.scale"),
    )
    parts: ClassVar[Parts] = {
        "attn.qkv": LINEAR,
        "attn.softmax": SOFTMAX,
        "attn.attn_drop": DROP,
        "attn.proj": LINEAR,
        "attn.proj_drop": DROP,
    }

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window, shift = (module.window_size, module.window_size), (module.shift_size, module.shift_size)
        why = bypass_reason(module, cls.parts) or window_reason(window, shift)
        return why or mask_reason(module.attn_mask, module.input_resolution, window, shift)

    def _attend(self: Any, x: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same."""
        attn, window = self.attn, (self.window_size, self.window_size)
        shift = (self.shift_size, self.shift_size)
        qkv = project(attn.qkv, x)  # [B, H, W, 3*inner_dim]
        x = window_attention(qkv, attn.num_heads, window, shift, None, attn.scale, 0.0, "timm")  # [B, H, W, inner_dim]
        return window_dropout(project(attn.proj, x), drop_probability(attn.proj_drop), window, shift)

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        divides = height % self.window_size == 0 and width % self.window_size == 0
        runs = x.shape[1] == height * width and divides and self.can_run()
        if not runs or drops(self.attn.attn_drop.p, self.attn.attn_drop.training):
            return self.source.forward(self, x)
        tokens = self.norm1(x).unflatten(1, (height, width))  # [B, H, W, C]
        x = x + self.drop_path(self._attend(tokens).flatten(1, 2))
        for mlp in self.mlps:
            x = x + self.drop_path(mlp(x))
        return x


class FastAuthorsPatchMerging(Structural):
    """Tokens [B, H*W, C] -> [B, H/2*W/2, Cout]."""

    ops = ("patch_merge",)
    origin = f"{FILE}/cell_operations.py: PatchMerging"
    structure: ClassVar[Structure] = {"": {"forward": ("2c1845df68fcc1da",)}}
    reads = ("input_resolution", "kernel")
    parts: ClassVar[Parts] = {
        "norm": MAYBE_NORM,
        "reduction": LINEAR,
        "soft_split": (nn.Unfold,),
        "padding": (nn.ZeroPad2d,),
    }

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        if x.shape[1] != height * width or height % 2 or width % 2 or not self.can_run():
            return self.source.forward(self, x)
        weight, bias, eps = _norm(self.norm)
        maps = x.unflatten(1, (height, width))  # [B, H, W, C]
        return patch_merge(maps, self.reduction.weight, self.kernel, 2, weight, bias, None, eps).flatten(1, 2)


class FastAuthorsPatchEmbed(Structural):
    """Images [B, Cin, H, W] -> tokens [B, Ho*Wo, C]."""

    ops = ("patch_embed",)
    origin = f"{FILE}/cell_infers/transformer.py: PatchEmbed"
    structure: ClassVar[Structure] = {"": {"forward": ("6aa0668e01c66847",)}}
    reads = ("img_size",)
    parts: ClassVar[Parts] = {"proj": (nn.Conv2d,), "padding": (nn.ZeroPad2d,), "norm": (*MAYBE_NORM, type(None))}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.parts)
        if why is None and min(module.padding.padding) < 0:
            why = "its patches are smaller than its stride"
        return why or convolution_reason(module.proj, pads=False)

    def forward(self: Any, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != tuple(self.img_size) or not self.can_run():
            return self.source.forward(self, x)
        weight, bias, eps = _norm(self.norm)
        proj = self.proj
        stride, dilation, zeros = proj.stride[0], proj.dilation[0], self.padding.padding
        tokens = patch_embed(x, proj.weight, proj.bias, stride, dilation, zeros, weight, bias, eps)
        return tokens.flatten(1, 2)
