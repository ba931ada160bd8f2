"""The As-ViT network, registered with timm."""

from .asvit import AsViT, convert_asvit_state_dict, create_model

__all__ = ["AsViT", "convert_asvit_state_dict", "create_model"]
