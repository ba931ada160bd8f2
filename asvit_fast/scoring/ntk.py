"""The neural tangent kernel of a batch and its condition number.

Source: As-ViT (arXiv 2202.11921), section 3.2, after Xiao et al. (arXiv 1912.13053). The kernel of sample i and j is
    the product of the gradients of their summed features; one backward pass serves all samples (``per_sample``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..errors import InputError
from ..models import AsViT
from ..settings import check_kind
from .memory import split_on_oom
from .outputs import as_features
from .per_sample import RowSink, per_sample_gradients
from .replica import replica

# what our networks are made of
_OUR_LAYERS = ("asvit_fast.models.", "asvit_fast.nn.")
_LAYERS = {
    nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.Sequential, nn.Tanh, DropPath, Mlp,
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = {"asvit_fast", "timm", "torch", "torchvision"}


def score_features(model: Any) -> Callable[[Tensor], Tensor]:
    """The features that scores look at, [B, 3, H, W] -> [B, F]: ``score_features`` of our networks, the pooled ones
    before the classifier of a timm model, the output of any other module (``as_features``)."""
    if hasattr(model, "score_features"):
        return model.score_features
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        return lambda x: as_features(model.forward_head(model.forward_features(x), pre_logits=True), x.shape[0])
    return lambda x: as_features(model(x), x.shape[0])


def ntk_gram(model: nn.Module, images: Tensor, parameters: str = "weights") -> Tensor:
    """Gram matrix [B, B], float64: G_ij = g_i . g_j, g_j the gradient of the sum of image j's features.

    Features [B, F] are what ``score_features(images)`` returns where the model has that method (our networks: the
    tokens averaged before the final norm), what goes into the classifier of a timm model
    (``forward_head(forward_features(images), pre_logits=True)``), the flattened output of any other module, or the
    logits or only tensor in it.

    Args:
        model: any module; evaluated in evaluation mode, on a copy:
            modes, gradients, buffers, caches and torch's random numbers stay what they are.
        images: [B, 3, H, W] on the model's device.
        parameters: "weights", those whose name contains "weight" (what the authors' code takes), or "all". Parameters
            that do not require or do not receive a gradient contribute nothing.

    Raises:
        InputError: no parameter to differentiate by, an unknown ``parameters``, images that are no tensor, features
            that are not [B, ...] or were computed without gradients.

    One forward and one backward pass, and a second backward pass where code outside of torch, timm and torchvision
    might reorder the batch inside a layer. Per-sample gradients of each layer are contracted at once and never
    kept. Layers it does not know are named in a warning and take a slower exact path. Splits the batch when memory runs
    out. The result carries no gradient.

    Examples:
        >>> import torch, asvit_fast as af
        >>> model = af.create_model("4,2,2|2,1,2|3,1,2|2,1,2|8", img_size=32)
        >>> gram = af.ntk_gram(model, torch.randn(4, 3, 32, 32))
        >>> gram.shape, gram.dtype
        (torch.Size([4, 4]), torch.float64)
    """
    check_kind("images", images, Tensor, "a tensor [B, 3, H, W]")
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return ntk_gram_of(model, images, parameters, torch.get_rng_state())


def ntk_gram_of(model: nn.Module, images: Tensor, parameters: str = "weights", draws: Tensor | None = None) -> Tensor:
    """``ntk_gram``, which may leave torch's generator changed if ``model`` draws random numbers.

    ``draws``: state of torch's generator to begin each forward pass with; None is what it has.
    """
    if parameters not in ("weights", "all"):
        raise InputError(f"parameters must be 'weights' or 'all', got {parameters!r}")
    network = replica(model)
    originals = dict(model.named_parameters())
    chosen = {  # copies of a scripted module's parameters are functions of the originals
        name: parameter if parameter.is_leaf else originals[name]
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (parameters == "all" or "weight" in name)
    }
    if not chosen:
        raise InputError("the NTK needs parameters that require gradients, the model has none")
    with torch.inference_mode(False):
        images = images.clone() if images.is_inference() else images
        gradients = partial(
            per_sample_gradients,
            _features(network, draws),
            parameters=chosen,
            probe=None if _is_ours(network) else images,
        )
        return _gram(partial(gradients, keeps_order=_keeps_order(network)), images, list(chosen))


def _features(model: nn.Module, draws: Tensor | None) -> Callable[[Tensor], Tensor]:
    features = score_features(model)

    def with_draws(images: Tensor) -> Tensor:
        if draws is not None:
            torch.set_rng_state(draws)
        return features(images)

    return with_draws


def _is_ours(model: nn.Module) -> bool:
    """Whether it is a network of ours with the layers that we give it, which all hold the samples one after the other:
    there is nothing to find out by trying."""
    return (
        isinstance(model, AsViT)
        and all(
            type(module) in _LAYERS or type(module).__module__.startswith(_OUR_LAYERS) for module in model.modules()
        )
        and _keeps_order(model)
    )


def _keeps_order(model: nn.Module) -> bool:
    """Whether all code of ``model`` is of libraries none of whose layers sees the batch in an order of its own."""

    def of_library(code: Any) -> bool:
        return (getattr(code, "__module__", None) or "torch").partition(".")[0] in _LIBRARIES

    return (
        all(
            not isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule))
            and of_library(type(module))
            and of_library(type(module).forward)
            and all(of_library(value) for value in vars(module).values() if callable(value))
            and not any(getattr(module, hooks) for hooks in _HOOKS)
            for module in model.modules()
        )
        and not torch_module._has_any_global_hook()
    )


def _gram(gradients: Callable[..., RowSink], images: Tensor, names: list[str]) -> Tensor:
    """The whole batch at once if it fits; in pieces the rows of gradients wait in main memory."""

    def run(part: slice) -> RowSink:
        return gradients(images[part], keep=part != slice(0, len(images)))

    sinks = split_on_oom(run, len(images), "the NTK")
    if len(sinks) == 1:
        return sinks[0].gram(len(images))
    gram = torch.zeros(len(images), len(images), dtype=torch.float64)
    for name in names:
        rows = [sink.rows[name] for sink in sinks if name in sink.rows]
        if rows:
            stacked = torch.cat(rows).double()  # [B, parameter]
            gram += stacked @ stacked.T
    return gram


def ntk_condition(gram: Tensor) -> float:
    """Largest over smallest eigenvalue of a Gram matrix [B, B]; inf (the worst) when it is not finite or singular.

    Singular to rounding: the smallest eigenvalue is at most B times the rounding unit of ``gram``'s dtype times the
    largest. Gradients in float32 under a float64 Gram matrix need no looser bound: errors of 6e-8 in a Jacobian are
    errors of their square, 4e-15, in its smallest eigenvalue, which is 16 images times float64's 2e-16.

    Raises:
        InputError: a matrix that is empty or not square.

    Examples:
        >>> import torch, asvit_fast as af
        >>> af.ntk_condition(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        4.0
        >>> af.ntk_condition(torch.ones(2, 2))  # singular
        inf
    """
    check_kind("gram", gram, Tensor, "a Gram matrix [B, B]")
    if not gram.is_floating_point():
        raise InputError(f"a Gram matrix is floating point, got {gram.dtype}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise InputError(f"a Gram matrix is square, got {list(gram.shape)}")
    if not torch.isfinite(gram).all():
        return float("inf")
    eigenvalues = torch.linalg.eigvalsh(gram.double())  # [B], ascending
    rounding = len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]
    if not eigenvalues[0] > max(rounding, 0.0):
        return float("inf")
    return float(eigenvalues[-1] / eigenvalues[0])
