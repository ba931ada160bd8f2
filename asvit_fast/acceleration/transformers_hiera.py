"""Replacements for Hiera (arXiv 2306.00989) in Hugging Face's transformers, whose windows are the columns of a matrix
of tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.hiera.modeling_hiera import HieraMaskUnitAttention, HieraMlp

from ..ops.window_attention import window_attention
from .chunked_mlp import ChunkedMlp
from .computing import project
from .replacement import LINEAR, Names, Parts, Replacement
from .transformers_layers import warn_wanted


class FastHieraMaskUnitAttention(Replacement, HieraMaskUnitAttention):
    """Tokens [B, N*windows, C] as a map of N rows, each column a window."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("num_heads", "query_stride", "scale", "window_size", "use_mask_unit_attn")
    parts: ClassVar[Parts] = {"qkv": LINEAR, "proj": LINEAR}

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        return "it pools its queries" if module.query_stride > 1 else None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return cls.skip_reason(module) or super().unsupported_reason(module)

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, output_attentions: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        wants = output_attentions or any(
            value is not None and value is not False for value in (*args, *kwargs.values())
        )
        if wants:
            warn_wanted(self.source.__name__, "output_attentions or a head_mask needs the attention weights")
        if wants or not self.can_run():
            kwargs["output_attentions"] = output_attentions
            return super().forward(hidden_states, *args, **kwargs)
        tokens = self.window_size if self.use_mask_unit_attn else hidden_states.shape[1]
        qkv = project(self.qkv, hidden_states).unflatten(1, (tokens, -1))  # [B, N, windows, 3*C]
        x = window_attention(qkv, self.num_heads, (tokens, 1), scale=self.scale)  # [B, N, windows, C]
        return project(self.proj, x.flatten(1, 2)), None


class FastHieraMlp(ChunkedMlp, HieraMlp):
    """Its feed-forward network."""

    order = ("fc1", "activation_fn", "fc2")
