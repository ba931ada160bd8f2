"""As-ViT (arXiv 2202.11921): overlapping patch embedding, four stages of windowed attention, overlapping patch merging.

Feature maps are channels last, [B, H, W, C], everywhere inside the network.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import torch
import torch.fx
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple, to_ntuple
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import InputError
from ..nn import FeatScale, Linear, OverlapPatchEmbed, PatchMerging, WindowAttention
from ..nn.position_embedding import resample_position_embedding
from ..settings import MIN_IMG_SIZE, POS_EMBEDS, check_choice, check_integer, check_rate, image_sides
from ..topology import EMBED_STRIDE, NAMED_TOPOLOGIES, StageSpec, Topology
from .state_dict import drop_norms

try:  # timm >= 1.0.30 records resizes so that saved models are rebuilt at their size
    from timm.models._input import update_model_input_size
except ImportError:
    update_model_input_size = None  # type: ignore[assignment]

__all__ = ["AsViT", "create_model"]

torch.fx.wrap("resample_position_embedding")  # it branches on sizes, which torch.fx does not know while it traces


def _norm(dim: int, enabled: bool, **factory: Any) -> nn.Module:
    return nn.LayerNorm(dim, **factory) if enabled else nn.Identity()


class Block(nn.Module):
    """x + Attention(norm(x)), then x + Mlp(norm(x)) on [B, H, W, dim]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stage: StageSpec,
        norm: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        attn_scale: bool,
        feat_scale: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(dim, norm, **factory)
        self.attn = WindowAttention(
            dim, num_heads, stage.splits, attn_drop, proj_drop, attn_scale, feat_scale, **factory
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = _norm(dim, norm, **factory)
        self.mlp = Mlp(dim, dim * stage.expansion, drop=proj_drop, **factory)
        for layer in (self.mlp.fc1, self.mlp.fc2):  # timm's Mlp makes its layers itself
            layer.__class__ = Linear
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patch merging (but for the first stage), then blocks: [B, H, W, in_dim] -> [B, ceil(H/2), ceil(W/2), dim]."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ClassifierHead(nn.Module):
    """Average pooling, Linear - Tanh (the pre-logits), dropout, Linear.

    ``pool=""`` hands the feature map through and needs ``num_classes=0``.
    """

    def __init__(self, dim: int, num_classes: int, pool: str, drop_rate: float, **factory: Any) -> None:
        super().__init__()
        self.dim = dim
        self.fc1 = nn.Linear(dim, dim, **factory)
        self.act = nn.Tanh()
        self.drop = nn.Dropout(drop_rate)
        self.fc2: nn.Module = nn.Identity()
        self.pool = pool
        self.reset(num_classes, pool, **factory)

    def reset(self, num_classes: int, pool: str | None = None, **factory: Any) -> None:
        """A new classifier; ``pool=None`` keeps the pooling."""
        pool = self.pool if pool is None else pool
        if pool not in ("avg", ""):
            raise InputError(f"global_pool must be 'avg' or '', got {pool!r}")
        if pool == "" and num_classes > 0:
            raise InputError(f"global_pool='' gives a feature map and needs num_classes=0, got {num_classes}")
        self.pool = pool
        self.fc2 = nn.Linear(self.dim, num_classes, **factory) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool == "":
            return x
        x = self.drop(self.act(self.fc1(x.mean(dim=(1, 2)))))  # [B, dim]
        return x if pre_logits else self.fc2(x)


class AsViT(nn.Module):
    """An As-ViT of any topology; ``create_model`` and ``timm.create_model("asvit", topology=...)`` make one.

    Images [B, in_chans, H, W] of any size from 32 pixels up. Feature maps that windows or merging do not divide are
    padded and the padding masked. ``pos_embed="absolute"`` adds a learned embedding after the patch LayerNorm,
    resampled when the grid differs from that of ``img_size``. ``norm="identity"`` leaves every LayerNorm out (the
    network whose curve is measured).

    Args:
        topology: a Topology or its text.
        img_size: pixels, int or (height, width): the grid of the position embedding.
        num_classes: 0 for no classifier.
        window_size: fixes the windows of the four stages in tokens instead of splitting the map.
        attn_scale, feat_scale: learned weights against over-smoothing in every attention (arXiv 2203.05962), both the
            identity at first.

    Raises:
        InputError: a value that cannot be used, naming it.

    Examples:
        >>> import torch, asvit_fast as af
        >>> model = af.AsViT("8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|16", img_size=64, num_classes=10)
        >>> model(torch.randn(2, 3, 64, 64)).shape  # [B, num_classes]
        torch.Size([2, 10])
        >>> model.score_features(torch.randn(2, 3, 64, 64)).shape  # [B, features]
        torch.Size([2, 256])
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["grid_size"]

    def __init__(
        self,
        topology: str | Topology = NAMED_TOPOLOGIES["asvit_seed"],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        pos_embed: str = "absolute",
        norm: str = "layer",
        window_size: Any | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_scale: bool = False,
        feat_scale: bool = False,
        weight_init: str = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_choice("pos_embed", pos_embed, POS_EMBEDS)
        check_choice("norm", norm, ("layer", "identity"))
        check_integer("num_classes", num_classes, 0)
        check_integer("in_chans", in_chans, 1)
        rates = {"drop_rate": drop_rate, "pos_drop_rate": pos_drop_rate, "proj_drop_rate": proj_drop_rate}
        for name, rate in {**rates, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate}.items():
            check_rate(name, rate)
        self.topology = Topology.parse(topology)
        self.img_size = image_sides(img_size, MIN_IMG_SIZE)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.topology.features
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.has_norms = norm == "layer"
        dims, heads = self.topology.dims, self.topology.stage_heads
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(self.topology.depths), stagewise=True)

        self.patch_embed = OverlapPatchEmbed(
            self.topology.stages[0].kernel, dims[0], in_chans, EMBED_STRIDE, self.has_norms, **factory
        )
        self.pos_embed = None
        if pos_embed == "absolute":
            self.pos_embed = nn.Parameter(torch.empty(1, *self.grid_size, dims[0], **factory))  # [1, H, W, C]
        self.pos_drop = nn.Dropout(pos_drop_rate)
        scales = {"attn_scale": attn_scale, "feat_scale": feat_scale}
        stages, self.feature_info = [], []
        for i, spec in enumerate(self.topology.stages):
            merging = PatchMerging(spec.kernel, dims[i - 1], dims[i], self.has_norms, **factory) if i else nn.Identity()
            blocks = [
                Block(
                    dims[i], heads[i], spec, self.has_norms, proj_drop_rate, attn_drop_rate, rate, **scales, **factory
                )
                for rate in drop_path[i]
            ]
            stages.append(Stage(merging, blocks))
            self.feature_info.append({"num_chs": dims[i], "reduction": EMBED_STRIDE * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = _norm(dims[-1], self.has_norms, **factory)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **factory)
        self._set_windows(window_size)
        if weight_init not in ("", "skip", "reset"):
            raise InputError(f"weight_init must be '', 'skip' or 'reset', got {weight_init!r}")
        if weight_init != "skip":
            self.init_weights()

    @property
    def grid_size(self) -> tuple[int, int]:
        """Tokens (rows, columns) after the patch embedding at ``img_size``, without token reduction."""
        return -(-self.img_size[0] // EMBED_STRIDE), -(-self.img_size[1] // EMBED_STRIDE)

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew: Linear N(0, 0.02), biases 0, LayerNorm 1 and 0, position embedding N(0, 0.02), the
        convolution U(+-1 / sqrt(fan_in)).

        The authors' network (VITA-Group/AsViT) starts so too; its truncation at 100 sigma is none.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention) and module.attn_scale is not None:
                nn.init.zeros_(module.attn_scale)
            elif isinstance(module, FeatScale):
                nn.init.zeros_(module.low)
                nn.init.zeros_(module.high)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.init_convolution(generator)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02, generator=generator)

    @torch.jit.ignore
    def init_convolution(self, generator: torch.Generator | None = None) -> None:
        """Draw the first projection anew: U(+-1 / sqrt(fan_in)), weight and bias, torch's default for convolutions."""
        projection: Any = self.patch_embed.proj
        bound = projection.weight[0].numel() ** -0.5
        nn.init.uniform_(projection.weight, -bound, bound, generator=generator)
        nn.init.uniform_(projection.bias, -bound, bound, generator=generator)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as any module; without norms of its own, take the weights of one with norms and leave theirs out."""
        return super().load_state_dict(state_dict if self.has_norms else drop_norms(state_dict), strict, assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        scales = ("attn_scale", "feat_scale.low", "feat_scale.high")
        return {"pos_embed"} | {name for name, _ in self.named_parameters() if name.endswith(scales)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+).downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^patch_embed|^pos_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes``; the pre-logits layer keeps its weights."""
        check_integer("num_classes", num_classes, 0)
        weight = self.head.fc1.weight
        self.head.reset(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        classifier: Any = self.head.fc2
        if num_classes > 0:
            nn.init.normal_(classifier.weight, std=0.02)
            nn.init.zeros_(classifier.bias)
        self.num_classes = num_classes
        self.global_pool = self.head.pool

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, window_size: Any | None = None) -> None:
        """Resample the position embedding to ``img_size`` pixels; fix the windows to ``window_size`` tokens, one value
        or one per stage (detection keeps windows while images grow)."""
        if img_size is not None:
            self.img_size = image_sides(img_size, MIN_IMG_SIZE)
            if self.pos_embed is not None:
                self.pos_embed = nn.Parameter(resample_position_embedding(self.pos_embed.data, self.grid_size))
        if window_size is not None:
            self._set_windows(window_size)
        if update_model_input_size is not None:
            update_model_input_size(self, self.img_size, window_size=self.window_size)

    def _set_windows(self, window_size: Any | None) -> None:
        windows = [w if w is None else to_2tuple(w) for w in to_ntuple(len(self.stages))(window_size)]
        integers = all(hasattr(side, "__index__") for window in windows if window is not None for side in window)
        if len(windows) != len(self.stages) or not integers:
            raise InputError(
                f"window_size must be one integer or one per stage ({len(self.stages)}), got {window_size!r}"
            )
        self.window_size = None if window_size is None else tuple(windows)
        stage: Any
        for stage, window in zip(self.stages, windows, strict=True):
            for block in stage.blocks:
                block.attn.window = window

    @torch.jit.ignore
    def set_token_reduction(self, reduction: int) -> None:
        """1, 2 or 4 times fewer tokens per side from now on, with the same weights (arXiv 2202.11921, section 3.4).

        Raises:
            InputError: any other reduction.
        """
        self.patch_embed.set_token_reduction(reduction)

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> tokens [B, h, w, C] with the position embedding added."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + resample_position_embedding(self.pos_embed, (x.shape[1], x.shape[2]))
        return self.pos_drop(x)

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final feature map [B, h, w, F] and the outputs of the stages ``indices`` (timm's contract)."""
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.embed(x)
        last = len(self.stages) - 1
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that ``forward_intermediates`` with these indices does not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised feature map [B, h, w, F]."""
        return self.norm(self.stages(self.embed(x)))

    def score_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> [B, F]: tokens averaged BEFORE the final norm, what every score looks at."""
        return self.stages(self.embed(x)).mean(dim=(1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def create_model(
    topology: str | Topology,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pos_embed: str = "none",
    norm: str = "layer",
    **kwargs: Any,
) -> AsViT:
    """The network of a topology. Without a position embedding by default, as topologies are searched and scored; the
    named models (``timm.create_model("asvit_small")``) carry one, as the paper's parameter counts need it.

    Args:
        topology: a Topology, its text, "8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88", or a name of Table 4, "asvit_small".
        img_size: pixels, int or (height, width), 32 or more.
        num_classes: 0 for no classifier.
        pos_embed: "absolute" or "none".
        norm: "layer", or "identity" for the network of the curve measures.
        kwargs: further arguments of AsViT (drop_path_rate, window_size, device, dtype, ...).

    Raises:
        InputError: a value that cannot be used, naming it.

    Examples:
        >>> import asvit_fast as af
        >>> model = af.create_model("asvit_seed", img_size=64, num_classes=10)
        >>> f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"
        '2.07 M parameters'
    """
    return AsViT(topology, img_size, num_classes=num_classes, pos_embed=pos_embed, norm=norm, **kwargs)
