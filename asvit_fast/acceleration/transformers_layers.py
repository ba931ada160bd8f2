"""What layers of Hugging Face's transformers have in common whose attention is cut into windows.

A layer gets tokens [B, H*W, C] and cuts windows for an attention with a Linear layer each for queries, keys and values:
its ``forward`` is replaced as a whole, so that maps are neither padded, rolled nor cut.
"""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops.position_bias import position_bias
from ..ops.window_attention import window_attention
from ..ops.windows import window_padding
from .chunked_mlp import run_in_parts, tokens_at_a_time, visible_reason
from .computing import (
    cosine_projections,
    cosine_scale,
    divides,
    drop_probability,
    drops,
    project,
    token_major,
    unit_heads,
    window_dropout,
    with_token_major_gradient,
)
from .merging import Merging
from .replacement import DROP, LINEAR, Names, Parts, Replacement, bypass_reason, call_reason
from .shifts import window_reason

LAYOUT = "torchvision"  # maps are padded, then rolled
Layers = tuple[Any, Any, Any]  # Linear layers for queries, keys and values
IMPLEMENTATIONS = (None, "eager", "sdpa")  # of attention, that compute the same


def wanted_reason(options: dict[str, Any]) -> str | None:
    """Why a call, by its optional arguments, needs the attention weights, which the op does not make."""
    if options.get("output_attentions"):
        return "output_attentions needs the attention weights"
    return None if options.get("head_mask") is None else "a head_mask needs the attention weights"


@torch.compiler.assume_constant_result  # a warning would break the graph: this one is given while tracing
def warn_wanted(name: str, why: str) -> None:
    backends.notify_once((name, why), f"asvit_fast runs {name} as its package does: {why}")


def implementation_reason(attention: Any) -> str | None:
    """Why an attention of transformers that chooses its implementation computes something else than the op."""
    implementation = attention.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        return f"its attention is {implementation!r}"
    return "its attention is causal" if attention.is_causal else None


def project_each(layers: Layers, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a map x [*, K]: [*, C] each."""
    q, k, v = layers
    return project(q, x), project(k, x), project(v, x)


def zeros_token(layers: Layers) -> Tensor | None:
    """What layers for queries, keys and values make of a token of zeros: [3*C], or None if it is zeros."""
    given = next((layer.bias for layer in layers if layer.bias is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


class WindowLayer(Replacement):
    """Base class: a layer with square windows, shifted or not."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("window_size", "shift_size", "layernorm_before", "layernorm_after", "drop_path")
    bypassed = ("get_attn_mask", "maybe_pad", "cyclic_shift")
    attention_windows: ClassVar[str] = ""  # path of the sides of windows that the attention has a bias for
    options: ClassVar[Names] = ()  # names of the arguments of ``forward`` after tokens and the size of the map

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "source" in vars(cls):
            cls.options = tuple(inspect.signature(cls.source.forward).parameters)[3:]

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window, shift = (module.window_size,) * 2, (module.shift_size,) * 2
        why = bypass_reason(module, cls.parts) or window_reason(window, shift)
        if why is not None:
            return why
        known = tuple(attrgetter(cls.attention_windows)(module))
        return None if window == known else f"its windows are {window}, those of its attention {known}"

    def _can_attend(self: Any, size: tuple[int, int], options: dict[str, Any]) -> bool:
        """Whether attention may run in one op on a map of that size, called with these options."""
        if hasattr(self, "set_shift_and_window_size") and not options.get("always_partition"):
            self.set_shift_and_window_size(size)  # once for all: later maps have these windows, too
        why = wanted_reason(options)
        if why is not None:
            warn_wanted(self.source.__name__, why)
        return why is None and self.can_run()


SPLIT_READS = (
    *WindowLayer.reads,
    "intermediate",
    "output",
    "attention.self.num_attention_heads",
    "attention.self.window_size",
)


class SplitLayer(WindowLayer):
    """A layer whose attention is made of `self` and `output`, its feed-forward network of `intermediate` and `output`,
    as most of the library's are."""

    attention_windows = "attention.self.window_size"
    reads: ClassVar[Names] = (
        *(*SPLIT_READS, "attention.self.attention_head_size"),
        *("attention.self.relative_position_bias_table", "attention.self.relative_position_index"),
    )

    @staticmethod
    def split_parts(attention: type, of_windows: type, output: type) -> Parts:
        """`parts` of a layer with these classes in it."""
        layers = {f"attention.self.{name}": LINEAR for name in ("query", "key", "value")}
        dropouts = {"attention.self.dropout": DROP, "attention.output.dropout": DROP}
        classes = {"attention": (attention,), "attention.self": (of_windows,), "attention.output": (output,)}
        return {**classes, **layers, **dropouts, "attention.output.dense": LINEAR}

    def _attention_drops(self: Any) -> bool:
        attention = self.attention
        return any(drops(part.p, part.training) for part in (attention.self.dropout, attention.output.dropout))

    def _attend(self: Any, x: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same."""
        attention, window, shift = self.attention.self, (self.window_size,) * 2, (self.shift_size,) * 2
        layers = attention.query, attention.key, attention.value
        maps = project_each(layers, x)  # [B, H, W, C] each
        padding = None if divides(window, x) else zeros_token(layers)
        bias = position_bias(attention.relative_position_bias_table, attention.relative_position_index)
        heads, scale = attention.num_attention_heads, attention.attention_head_size**-0.5
        x = window_attention(maps, heads, window, shift, bias, scale, 0.0, LAYOUT, padding)
        return project(self.attention.output.dense, x)

    def _feed_forward(self: Any, x: Tensor) -> Tensor:
        """Tokens [B, H*W, C] -> the same, in parts where that is faster."""

        def run(part: Tensor) -> Tensor:
            return self.output(self.intermediate(part))

        modules = self.intermediate, self.output
        layers = [layer for module in modules for layer in module.children()]
        tokens = tokens_at_a_time(layers, x)
        if tokens is None or any(map(call_reason, modules)) or visible_reason(("", layer) for layer in layers):
            return run(x)
        return run_in_parts(run, x, tokens)

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
    ) -> Any:  # a tuple, whose length the sources annotate in several ways
        options = dict(zip(self.options, args, strict=False)) | kwargs
        if not self._can_attend(input_dimensions, options) or self._attention_drops():
            return super().forward(hidden_states, input_dimensions, *args, **kwargs)  # type: ignore[misc]
        return (with_token_major_gradient(self._layer(token_major(hidden_states), input_dimensions)),)

    def _layer(self: Any, hidden_states: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, H*W, C] -> the same."""
        x = self._attend(self.layernorm_before(hidden_states).unflatten(1, size)).flatten(1, 2)
        x = hidden_states + self.drop_path(x)
        return x + self._feed_forward(self.layernorm_after(x))


class CosineLayer(SplitLayer):
    """The same with cosine attention and a bias that a small network makes (Swin V2, arXiv 2111.09883); it normalises
    after attention and feed-forward network."""

    reads: ClassVar[Names] = (
        *SPLIT_READS,
        *(f"attention.self.{name}" for name in ("logit_scale", "continuous_position_bias_mlp")),
        *(f"attention.self.{name}" for name in ("relative_coords_table", "relative_position_index")),
    )

    def _attend(self: Any, x: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same. The source adds -100, the mask of a shift, twice, which hides the largest of
        cosines times 100, as masking altogether does; the op adds it once, unless nothing is padding."""
        attention, window, shift = self.attention.self, (self.window_size,) * 2, (self.shift_size,) * 2
        rows, columns = x.shape[1:3]
        if self.shift_size > 0:
            below, right = (window_padding(n, self.window_size) for n in (rows, columns))
            x = F.pad(x, (0, 0, 0, right, 0, below))
        heads, layers = attention.num_attention_heads, (attention.query, attention.key, attention.value)
        q, k, v = project_each(layers, x)  # [B, H, W, C] each
        padding = None if divides(window, x) else zeros_token(layers)
        if padding is not None:
            padding = torch.cat(cosine_projections(padding.to(q.dtype), heads))
        table = attention.continuous_position_bias_mlp(attention.relative_coords_table).flatten(
            0, -2
        )  # [offsets, heads]
        bias = position_bias(16 * torch.sigmoid(table), attention.relative_position_index)
        maps, scale = (unit_heads(q, heads), unit_heads(k, heads), v), cosine_scale(attention.logit_scale)
        layout = "masked" if self.shift_size > 0 else LAYOUT
        x = window_attention(maps, heads, window, shift, bias, scale, 0.0, layout, padding)[:, :rows, :columns]
        return project(self.attention.output.dense, x)

    def _layer(self: Any, hidden_states: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, H*W, C] -> the same."""
        x = self.layernorm_before(self._attend(hidden_states.unflatten(1, size)).flatten(1, 2))
        x = hidden_states + self.drop_path(x)
        return x + self.drop_path(self.layernorm_after(self._feed_forward(x)))


class JoinedLayer(WindowLayer):
    """A layer whose attention and feed-forward network are a module each, as Swin has them since transformers 5."""

    attention_windows = "attention.relative_position_bias.window_size"
    reads: ClassVar[Names] = (
        *(*WindowLayer.reads, "mlp", "attention.num_attention_heads", "attention.scaling"),
        *("attention.attention_dropout", "attention.config", "attention.is_causal"),
        *("attention.relative_position_bias", "attention.relative_position_bias.window_size"),
    )

    @staticmethod
    def joined_parts(attention: type, bias: type) -> Parts:
        """`parts` of a layer with an attention and a bias of these classes."""
        layers = {f"attention.{name}": LINEAR for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return {"attention": (attention,), "attention.relative_position_bias": (bias,), **layers, "dropout": DROP}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return super().unsupported_reason(module) or implementation_reason(module.attention)

    def _attend(self: Any, x: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same."""
        attention, window, shift = self.attention, (self.window_size,) * 2, (self.shift_size,) * 2
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        maps = project_each(layers, x)  # [B, H, W, C] each
        padding = None if divides(window, x) else zeros_token(layers)
        bias = attention.relative_position_bias()[0]  # [heads, N, N]
        heads = attention.num_attention_heads
        x = window_attention(maps, heads, window, shift, bias, attention.scaling, 0.0, LAYOUT, padding)
        return window_dropout(project(attention.o_proj, x), drop_probability(self.dropout), window, shift, LAYOUT)

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        attention = self.attention
        options = dict(zip(self.options, args, strict=False)) | kwargs
        if options.get("output_attentions") is None:
            options["output_attentions"] = attention.config.output_attentions
        runs = self._can_attend(input_dimensions, options)
        if not runs or drops(attention.attention_dropout, attention.training):
            return super().forward(hidden_states, input_dimensions, *args, **kwargs)  # type: ignore[misc]
        x = self._attend(self.layernorm_before(hidden_states).unflatten(1, input_dimensions)).flatten(1, 2)
        x = hidden_states + self.drop_path(x)
        return self.dropout(self.mlp(self.layernorm_after(x))) + x, None


class TokenMerging(Merging):
    """2 x 2 tokens of a map that is handed in as tokens [B, H*W, C], with its size -> [B, ceil(H/2)*ceil(W/2), 2*C]."""

    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}
    bypassed = ("maybe_pad",)

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        if not self.can_run():
            return super().forward(input_feature, input_dimensions)  # type: ignore[misc]
        return self._merge(input_feature.unflatten(1, input_dimensions)).flatten(1, 2)
