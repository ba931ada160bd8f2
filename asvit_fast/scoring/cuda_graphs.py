"""CUDA graphs of passes that come again: launched as one, from buffers that stay where they are.

The first pass of a kind runs as it is, the second one is captured: a search that has found its topologies replays. The
last few graphs are kept, and share one pool of memory on each GPU: they are replayed one at a time, each result copied
to main memory before the next.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cuda_capture import capturing
from ..errors import first_line
from ..memory import is_out_of_memory

Pass = Callable[..., Tensor]  # (*inputs) -> output, all on one device, without reading a number of theirs

MOST_GRAPHS = 16
MOST_REMEMBERED = 4096  # kinds of passes seen once
SHARE_OF_MEMORY = 1 / 16  # of a GPU, for inputs and outputs of all graphs


@dataclass
class Recorded:
    """A pass that ``replay`` computes again, from what is in ``inputs`` then, into ``output``."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], Any]
    pool: Any = None  # of memory, shared with other graphs

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs, self.output))


def capture(function: Pass, inputs: Sequence[Tensor], stream: torch.cuda.Stream, pool: Any) -> Recorded:
    """Capture ``function`` on copies of ``inputs`` [any shapes], on the current GPU."""
    static = [torch.empty_like(x, device=stream.device) for x in inputs]
    copy_into(static, inputs)
    caller = torch.cuda.current_stream()
    stream.wait_stream(caller)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function(*static)  # compiles kernels; libraries take their workspaces for this stream
    with capturing(graph, stream, pool):
        output = function(*static)
    caller.wait_stream(stream)
    return Recorded(static, output, graph.replay, graph.pool())


def copy_into(static: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    for target, source in zip(static, inputs, strict=True):
        target.copy_(source, non_blocking=True)


class GraphCache:
    """The graphs of one process. ``capture`` may be another function of the same kind, for tests without a GPU."""

    def __init__(self, capture: Callable[..., Recorded] = capture, most: int = MOST_GRAPHS) -> None:
        self.capture = capture
        self.most = most
        self.graphs: OrderedDict[Hashable, Recorded] = OrderedDict()  # the last used one last
        self.seen: OrderedDict[Hashable, None] = OrderedDict()
        self.failed: set[Hashable] = set()  # kinds that cannot be captured
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.RLock()  # buffers are used by one pass at a time

    def run(self, kind: str, key: Hashable, function: Pass, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
        """``function(*inputs)`` on ``device``, the result in main memory.

        Args:
            kind: what a message calls the pass.
            key: passes with the same key, and inputs of the same shapes and dtypes, differ in the inputs' numbers only.
            function: makes no tensor from one of another device, reads none and draws no random numbers.
            inputs: on ``device`` or, better pinned, in main memory.
        """
        key = (kind, key, device, *((x.shape, x.dtype) for x in inputs), _switches())
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device) if on_gpu else nullcontext():
            with self._lock:
                recorded = self.graphs.get(key) or self._try_to_record(kind, key, function, inputs, device)
                if recorded is not None:
                    self.graphs.move_to_end(key)
                    copy_into(recorded.inputs, inputs)
                    recorded.replay()
                    return recorded.output.to("cpu", copy=True)
            return function(*(x.to(device, non_blocking=True) for x in inputs)).cpu()

    def clear(self) -> None:
        """Give their memory back."""
        with self._lock:
            self.graphs.clear()

    def _try_to_record(
        self, kind: str, key: Hashable, function: Pass, inputs: Sequence[Tensor], device: torch.device
    ) -> Recorded | None:
        if key not in self.seen:
            self.seen[key] = None
            while len(self.seen) > MOST_REMEMBERED:
                self.seen.popitem(last=False)
            return None
        if kind in self.failed or (device.type != "cuda" and self.capture is capture):
            return None
        try:
            stream = self._stream(device)
            recorded = self.capture(function, inputs, stream, self._pool(device))
        except RuntimeError as error:
            if is_out_of_memory(error):
                self.clear()
                return None
            self.failed.add(kind)
            reason = first_line(error.__context__ or error)  # what happened, before the capture that it ended
            backends.notify_once(
                ("cuda graph", kind), f"asvit_fast: {kind} is launched kernel by kernel, without a CUDA graph: {reason}"
            )
            return None
        self.graphs[key] = recorded
        limit = _memory(device) * SHARE_OF_MEMORY
        while len(self.graphs) > 1 and (len(self.graphs) > self.most or self._bytes() > limit):
            self.graphs.popitem(last=False)
        return recorded

    def _bytes(self) -> int:
        return sum(graph.bytes for graph in self.graphs.values())

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """One for all captures: libraries keep a workspace for each stream that they have seen."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pool(self, device: torch.device) -> Any:
        """That of the device's graphs; None makes a new one."""
        return next((graph.pool for graph in self.graphs.values() if graph.output.device == device), None)


def _memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def _switches() -> tuple[Any, ...]:
    """What else decides which kernels run."""
    matmul = torch.backends.cuda.matmul
    return backends.forced_backend(), matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()


GRAPHS = GraphCache()
