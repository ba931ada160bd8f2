"""Shared by the launches of all kernels: how they are started, on which GPU, and how sums are cut into programs."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel

Launch = tuple[tuple[int], dict[str, Any]]  # the grid; by name, arguments that are no tensors, and Triton's options
PROGRAMS = 1024  # that work is cut into where each goes through several pieces of it: a few for every multiprocessor
ALIGNMENT = 16  # bytes: Triton compiles kernels apart for pointers that are multiples of it
_no_guard = contextlib.nullcontext()
_address, _dtype = torch.Tensor.data_ptr, operator.attrgetter("dtype")


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


class Launcher:
    """Starts a kernel whose grid and arguments, but for tensors and some numbers, are always the same.

    Triton's own launch binds and hashes every argument anew, which takes the host longer than a small kernel takes the
    GPU. What it found the first time holds as long as dtypes and device are the same and all tensors begin at multiples
    of ALIGNMENT: then the compiled kernel is started as it is. Other launches, and those of Triton's interpreter, are
    Triton's.

    Args:
        kernel: a function with ``triton.jit``, whose first arguments are the tensors.
        grid: programs.
        arguments: by name, arguments that are no tensors, and Triton's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int], arguments: dict[str, Any]) -> None:
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self._places: dict[str, int] = {}  # of arguments by name
        self._template: list[Any] = []  # all arguments, in order; None for tensors and numbers
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: torch.Tensor, **numbers: float) -> None:
        """Start the kernel on the GPU of the tensors, with further arguments by name, which must be floats."""
        if _several_gpus():
            with torch.cuda.device_of(tensors[0]):
                self._start(tensors, numbers)
        else:
            self._start(tensors, numbers)

    def _start(self, tensors: tuple[torch.Tensor, ...], numbers: dict[str, float]) -> None:
        if self._compiled and not self.kernel.pre_run_hooks:
            start, addresses = self._compiled.get(self._key(tensors)), [*map(_address, tensors)]
            if start is not None and _are_aligned(addresses):
                arguments = self._template.copy()
                arguments[: len(addresses)] = addresses
                for name, number in numbers.items():
                    arguments[self._places[name]] = number
                start(*arguments)
                return
        compiled = self.kernel[self.grid](*tensors, **numbers, **self.arguments)
        if isinstance(compiled, CompiledKernel) and _are_aligned(map(_address, tensors)):
            self._keep(compiled, tensors)

    def _keep(self, compiled: CompiledKernel, tensors: tuple[torch.Tensor, ...]) -> None:
        names = self.kernel.arg_names
        self._places = {name: place for place, name in enumerate(names)}
        self._template = [self.arguments.get(name) for name in names]
        self._compiled[self._key(tensors)] = compiled[(*self.grid, 1, 1)]

    @staticmethod
    def _key(tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """What Triton compiles another kernel for, besides the pointers' alignment: `debug` and `instrumentation_mode`
        are options that may be set at any time."""
        options = knobs.runtime.debug, knobs.compilation.instrumentation_mode
        return (*map(_dtype, tensors), tensors[0].get_device(), *options)


def _are_aligned(addresses: Any) -> bool:
    return functools.reduce(operator.or_, addresses) % ALIGNMENT == 0
