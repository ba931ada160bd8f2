"""What a call would start on a GPU, counted on a CPU: operations of torch that compute, allocate or make the host wait,
and Triton's kernels, which are not started."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import triton
from torch.utils._python_dispatch import TorchDispatchMode

from asvit_fast import backends
from asvit_fast.ops import fused_op

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = ("_unsafe_view", "_reshape_alias")  # besides those that say so
# the host waits for the device
SYNCS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")


class Kernels(TorchDispatchMode):
    """Names of operations and kernels, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []
        self.allocated: list[str] = []
        self.waited: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ALLOCATIONS:
            self.allocated.append(name)
        elif name in SYNCS:
            self.waited.append(name)
        elif not function.is_view and name not in VIEWS:
            self.started.append(name)
        return function(*args, **(kwargs or {}))

    def counts(self) -> Counter[str]:
        """How often each was started."""
        return Counter(self.started)


@contextlib.contextmanager
def counted(monkeypatch: Any) -> Iterator[Kernels]:
    """Ops take their eager path and their Triton kernels for tensors of the CPU."""
    kernels = Kernels()
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *_, **__: kernels.started.append(kernel.__name__))
    monkeypatch.setattr(fused_op, "_inside_a_mode", lambda: False)  # that of the counting is none
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    backends._reason.cache_clear()
    try:
        with backends.use_backend("triton"), kernels:
            yield kernels
    finally:
        backends._reason.cache_clear()
