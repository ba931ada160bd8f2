"""One network on many processes: DistributedDataParallel, or FSDP2, or plainly itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from .. import processes


def shard(model: nn.Module, device: torch.device) -> None:
    """FSDP2 in place: every block of a sequence of blocks gathers its parameters when it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [
        child
        for module in model.modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        for child in module.children()
        if next(child.parameters(), None) is not None and not isinstance(child, (nn.Sequential, nn.ModuleList))
    ]
    for block in reversed(blocks):  # the innermost first
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Make what the training step calls: averages gradients over the ranks, unless FSDP2 does or there is one rank."""
    if not processes.is_distributed() or isinstance(model, FSDPModule):
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(replica: nn.Module, enabled: bool) -> Iterator[None]:
    """Passes of an update but the last keep their gradients to themselves."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(enabled)
    waits = isinstance(replica, DistributedDataParallel) and not enabled
    with cast(DistributedDataParallel, replica).no_sync() if waits else contextlib.nullcontext():
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whose parts may lie on several processes, put together. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(state: Any) -> Any:
    """A nest of dicts and lists with whole tensors on the CPU for sharded ones. Every rank must call it.

    ``torch.distributed.checkpoint.state_dict`` would not do: ``get_optimizer_state_dict`` steps an optimizer that has
    no state yet (Adam's count is then 1 before the first update), ``set_optimizer_state_dict`` accepts other groups of
    weights, and ``set_model_state_dict`` checkpoints that lack some.
    """
    return tree_map_only(Tensor, lambda tensor: full_tensor(tensor).detach().cpu(), state)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a plain or sharded module."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load whole tensors into the optimizer of a plain or sharded module.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: what is not a state of such an optimizer.
    """
    for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for name, value in group.items():
            if name in own and not _alike(own[name], value):
                raise ValueError(f"{name} of the optimizer must be as {own[name]!r}, got {value!r}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    shards = {
        index: {
            name: _like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in state["state"].get(index, {}).items()
        }
        for index, parameter in zip(indices, parameters, strict=True)
    }
    optimizer.load_state_dict({**state, "state": {index: entry for index, entry in shards.items() if entry}})


def _alike(own: Any, value: Any) -> bool:
    """Return whether a hyperparameter can stand for another: numbers for numbers, as many of them."""
    if isinstance(own, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(own) == len(value) and all(map(_alike, own, value))
    numbers = (bool, int, float, Tensor)
    return own is None or value is None or isinstance(value, numbers if isinstance(own, numbers) else type(own))


def _like(value: Any, target: Tensor | None) -> Any:
    """``value`` cut as ``target`` is."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
