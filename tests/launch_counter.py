"""What a call asks of a GPU: kernels launched, tensors allocated, waits for the GPU; counted from torch's operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# operators that start no kernel, besides those whose result is a view
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty"}
NO_KERNEL = {*MEMORY, "_unsafe_view", "detach", "lift_fresh", "device", "is_pinned"}
# kernels of operators that start several
KERNELS = {"constant_pad_nd": 2, "native_layer_norm_backward": 2, "baddbmm": 2, "convolution_backward": 2}
HOST_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item"}


class LaunchCounter(TorchDispatchMode):
    """Counts by operator, within a `with` block, on any device.

    ``launches``: kernels, copies among them; a custom op of ours is one. ``allocations``: results in memory of their
    own. ``syncs``: operators that make the host wait. ``transfers``: those between devices. ``numbers``: hands a 0 to
    whoever reads a number, of fake tensors, which have none.
    """

    def __init__(self, numbers: bool = False) -> None:
        super().__init__()
        self.numbers = numbers
        self.launches: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in HOST_READS:
            self.syncs[name] += self.touches_gpu(given)
            if self.numbers:
                return 0.0 if name == "_local_scalar_dense" and given[0].is_floating_point() else name == "equal"
        result = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        on_host = {x.device.type for x in made} == {"cpu"} and "cuda" in {x.device.type for x in given}
        if on_host and not kwargs.get("non_blocking"):
            self.syncs[name] += 1
        if not self.touches_gpu(given + made) or func.is_view or name in HOST_READS:
            return result
        if name not in NO_KERNEL:
            self.launches[name] += KERNELS.get(name, 1)
        if (name in MEMORY or name not in NO_KERNEL) and not func._schema.is_mutable:
            self.allocations[name] += len(made)
        if len({x.device.type for x in given + made if x.dim()}) > 1:
            self.transfers[name] += 1
        return result

    @staticmethod
    def touches_gpu(tensors: list[torch.Tensor]) -> bool:
        """On a machine with a GPU, even a fake one, work of the CPU does not count."""
        return not torch.cuda.is_available() or any(x.device.type == "cuda" for x in tensors)

    def totals(self) -> dict[str, int]:
        kinds = ("launches", "allocations", "syncs", "transfers")
        return {kind: sum(getattr(self, kind).values()) for kind in kinds}
