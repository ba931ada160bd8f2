"""Networks of other packages, made without weights from anywhere: of transformers by configuration, of any function."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError, one_line
from ..settings import ImageSize, image_sides

HUGGING_FACE = "hf:"
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # module:function


def is_foreign(name: str) -> bool:
    """Whether it has the form ``hf:NAME`` or ``module:function``."""
    return name.startswith(HUGGING_FACE) or FUNCTION.fullmatch(name) is not None


def create_foreign(name: str, img_size: ImageSize | None = None) -> nn.Module:
    """The network of ``hf:NAME`` with fresh weights for images of this size, or the one that ``module:function()``
    returns.

    NAME is a type of model (``swin``: its default configuration, with its classifier where it has one), a class
    (``SwinForImageClassification``), a folder with a config.json, or a name on the Hub whose configuration is in the
    local cache. Nothing is downloaded.

    Raises:
        InputError: transformers is not installed; an unknown name, module or function; a network that takes no images.
    """
    if name.startswith(HUGGING_FACE):
        return _of_transformers(name.removeprefix(HUGGING_FACE), img_size)
    return _of_function(*name.split(":"))


def input_shape(model: nn.Module, img_size: ImageSize | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a network says it takes; 3 x 224 x 224 where it says nothing."""
    config: Any = getattr(model, "config", None)
    known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    channels = getattr(config, "num_channels", None) or getattr(model, "in_chans", None) or known[0]
    embedding = getattr(model, "patch_embed", None)  # of timm, which knows the size that the network was made for
    made_for = getattr(config, "image_size", None) or getattr(model, "img_size", None) or _size(embedding)
    size = img_size or made_for or tuple(known[1:])
    return (channels, *image_sides(size))


def _size(embedding: object) -> ImageSize | None:
    found = getattr(embedding, "img_size", None)
    return found if isinstance(found, (int, tuple)) else None


def _of_transformers(name: str, img_size: ImageSize | None) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"hf:{name} needs transformers, which is not installed: pip install transformers")
    import transformers

    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(model_class, type) and issubclass(model_class, nn.Module):
        config = model_class.config_class()  # type: ignore[attr-defined]
    else:
        config = _configuration(name)
        named = (getattr(config, "architectures", None) or [""])[0]
        model_class = getattr(transformers, named, None) or _auto_class(config)
    make = getattr(model_class, "_from_config", None) or model_class.from_config  # type: ignore[union-attr]
    try:
        if img_size is not None and hasattr(config, "image_size"):
            pair = isinstance(config.image_size, (list, tuple))
            config.image_size = image_sides(img_size) if pair else img_size
        model = make(config)
    except Exception as error:  # whatever a constructor makes of a configuration
        raise InputError(f"hf:{name} cannot be made from its configuration: {one_line(error)}") from error
    if model.main_input_name != "pixel_values":
        raise InputError(f"hf:{name} takes {model.main_input_name}, not images; give a network of images")
    return model


def _configuration(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name)
    if not Path(name).is_dir() and "/" not in name:
        raise InputError(
            f"hf:{name}: transformers has no such type of model or class, and there is no such folder; give one such "
            "as hf:swin or hf:SwinForImageClassification"
        )
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        where = "no folder with a config.json, and in the local cache of the Hub it is not"
        reason = one_line(error) if Path(name).is_dir() else where
        raise InputError(
            f"hf:{name} cannot be read ({reason}): nothing is downloaded; give a folder or a type of model, hf:swin"
        ) from error


def _auto_class(config: Any) -> Any:
    """With its classifier where the library has one."""
    from transformers import AutoModel, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as WITH_CLASSIFIER

    return AutoModelForImageClassification if type(config) in WITH_CLASSIFIER else AutoModel


def _of_function(module_name: str, function_name: str) -> nn.Module:
    name = f"{module_name}:{function_name}"
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))  # a script beside which the command is called, as with python -m
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code
        what = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise InputError(f"{name}: {module_name} cannot be imported: {what}{one_line(error)}") from error
    finally:
        sys.path[:] = before
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{name}: {module_name} has no function {function_name}")
    try:
        model = function()
    except (Exception, SystemExit) as error:  # the user's code
        raise InputError(f"{name} raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model
