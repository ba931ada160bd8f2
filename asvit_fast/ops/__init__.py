"""Operations: each has a pure-torch reference and the implementations that ``backends`` chooses from."""

from . import flops, torchscript
from .gelu_taylor import gelu_taylor
from .layer_norm_taylor import layer_norm_taylor
from .linear import linear
from .patch_embed import patch_embed
from .patch_merge import patch_merge
from .position_bias import position_bias
from .softmax_taylor import softmax_taylor
from .square_taylor import square_taylor
from .tanh_taylor import tanh_taylor
from .window_attention import window_attention
from .window_attention_taylor import window_attention_taylor

__all__ = [
    "gelu_taylor",
    "layer_norm_taylor",
    "linear",
    "patch_embed",
    "patch_merge",
    "position_bias",
    "softmax_taylor",
    "square_taylor",
    "tanh_taylor",
    "window_attention",
    "window_attention_taylor",
]

flops.register()
torchscript.register()
