"""Modules of repositories that are no packages, from checkouts: what they import and is not installed has stand-ins."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import timm.layers
from torch import Tensor, nn


class Registry:
    """Decorators that register a class by its name, of which a single file needs none."""

    def register_module(self, *args: Any, **kwargs: Any) -> Any:
        return lambda kind: kind

    register = register_module


class BaseModule(nn.Module):
    """That of mmcv and mmengine: a module with a configuration of its initial weights."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        pass


def build_norm_layer(config: Any, features: int) -> tuple[str, nn.Module]:
    return "norm", nn.LayerNorm(features)


def build_dropout(config: Any) -> nn.Module:
    return timm.layers.DropPath(config.get("drop_prob", 0.0))


KNOWN = {
    "BaseModule": BaseModule,
    "ModuleList": nn.ModuleList,
    "build_norm_layer": build_norm_layer,
    "build_dropout": build_dropout,
    "to_2tuple": timm.layers.to_2tuple,
    "trunc_normal_": timm.layers.trunc_normal_,
    "Linear": nn.Linear,
    "LayerNorm": nn.LayerNorm,
    "scandir": lambda folder: [],  # of what a package would import all
    "digit_version": lambda text: tuple(int(part) for part in text.split("+")[0].split(".")[:2]),
}


class Named(types.ModuleType):
    """A module in which every name that is asked for is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return KNOWN.get(name, Registry() if name.isupper() else nn.Identity)


class OfSize(nn.Module):
    """An attention that is called with tokens and the size of their map, for maps [B, H, W, C]."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.flatten(1, 2), x.shape[1:3])


STANDS_IN = ("mmcv", "mmengine", "mmdet", "mmseg", "mmaction", "mmpretrain", "mmcls", "mmcv_custom", "basicsr")


class _Finder:
    """Finds what a file imports of packages that it comes with."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in STANDS_IN and not name.startswith("of_checkout"):
            return None
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules and leaf in KNOWN:  # installed, in another version
            setattr(sys.modules[parent], leaf, KNOWN[leaf])
            return None
        return importlib.util.spec_from_loader(name, _Finder, is_package=True)

    @staticmethod
    def create_module(spec: Any) -> types.ModuleType:
        return Named(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


def load(path: Path) -> types.ModuleType:
    """A single file of a checkout as a module."""
    name = "of_checkout." + "_".join(path.with_suffix("").parts[-5:]).replace("-", "_").replace(".", "_") + ".a.b.file"
    if name in sys.modules:
        return sys.modules[name]
    sys.meta_path.append(_Finder)  # last: what is installed comes first
    root = str(next((parent for parent in path.parents if (parent / "swinfir").is_dir()), path.parent))
    sys.path.insert(0, root)
    if "timm.models.layers" not in sys.modules:
        sys.modules["timm.models.layers"] = timm.layers
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except BaseException:
        sys.modules.pop(name, None)
        raise
    finally:
        sys.meta_path.remove(_Finder)
        sys.path.remove(root)
