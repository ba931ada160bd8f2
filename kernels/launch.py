"""Shared by the launches of all kernels: the GPU of their tensors, and how sums are cut into programs."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton

Launch = tuple[tuple[int], dict[str, Any]]  # the grid; by name, arguments that are no tensors, and Triton's options
PROGRAMS = 1024  # that work is cut into where each goes through several pieces of it: a few for every multiprocessor
_no_guard = contextlib.nullcontext()


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the GPU of x the current one, on which Triton launches, inside the block."""
    return torch.cuda.device_of(x) if _several_gpus() else _no_guard


def grouped(steps: int, pieces: int = 1, waves: int = 1) -> tuple[int, int]:
    """Steps per program, and programs per piece of work in each step, for about PROGRAMS programs in each wave."""
    per_program = max(1, triton.cdiv(steps * pieces, waves * PROGRAMS))
    return per_program, triton.cdiv(steps, per_program)
