"""The As-ViT network, registered with timm."""

from . import variants  # noqa: F401  (it registers the names)
from .asvit import AsViT, create_model
from .state_dict import convert_asvit_state_dict

__all__ = ["AsViT", "convert_asvit_state_dict", "create_model"]
