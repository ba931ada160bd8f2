"""Capturing a CUDA graph, so that a failure leaves the GPU usable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """What is launched inside the block on ``stream``, which becomes the current one, is captured into ``graph``.

    Without ``torch.cuda.graph``, which waits for the GPU and gives all cached memory back each time. A capture that
    fails would also leave the GPU's random number generator in it: every later draw raised "Offset increment outside
    graph capture".

    Args:
        pool: of memory, of graphs that are replayed one at a time; None makes a new one.
    """
    generator = torch.cuda.default_generators[stream.device.index]
    before = generator.clone_state()
    with torch.cuda.stream(stream):
        # threads of others may use the GPU meanwhile; autograd's work for the stream that is captured
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            try:
                yield
            finally:
                graph.capture_end()
        except BaseException:
            generator.graphsafe_set_state(before)
            raise
