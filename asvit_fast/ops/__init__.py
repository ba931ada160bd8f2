"""Operations: each has a pure-torch reference and the implementations that ``backends`` chooses from."""

from .gelu_taylor import gelu_taylor
from .patch_embed import patch_embed
from .patch_merge import patch_merge
from .window_attention import window_attention
from .window_attention_taylor import window_attention_taylor

__all__ = ["gelu_taylor", "patch_embed", "patch_merge", "window_attention", "window_attention_taylor"]
