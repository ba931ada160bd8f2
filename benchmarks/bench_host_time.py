"""The cost of a call of an op besides its kernel: tiny inputs, eager, forward and forward with backward.

    python benchmarks/bench_host_time.py [--triton] [--csv FILE]

Beside torch's functions of about the same form. One thread, all in turn. The compiled kernels themselves take about a
microsecond on these inputs. With --triton the ops take their Triton kernels, which are not started: what is left is the
host's part up to Triton's own launch, and no GPU is needed. "calls" are Python's and C's, all of them and those of
kernels/, which do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_fast import ops
from asvit_fast.bench.timer import Row, compare, print_header, save_rows
from asvit_fast.kernels import tile_table

QKV, WEIGHT = torch.randn(1, 4, 4, 24), torch.randn(8, 8)
TOKENS, MERGE, NORM = torch.randn(1, 4, 4, 4), torch.randn(8, 16), torch.randn(16)
IMAGE, PATCH, GAIN = torch.randn(1, 3, 8, 8), torch.randn(8, 3, 4, 4), torch.randn(8)
STACK = torch.randn(3, 4, 8)
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "F.linear": (F.linear, [STACK, WEIGHT]),
    "F.layer_norm": (lambda x, w: F.layer_norm(x, (8,), w), [STACK, GAIN]),
    "window_attention": (lambda qkv: ops.window_attention(qkv, 2, (2, 2), (1, 1)), [QKV]),
    "window_attention bf16": (lambda qkv: ops.window_attention(qkv, 2, (2, 2), (1, 1)), [QKV.bfloat16()]),
    "patch_merge": (lambda x, w, g: ops.patch_merge(x, w, 2, 2, g), [TOKENS, MERGE, NORM]),
    "patch_embed": (lambda x, w, g: ops.patch_embed(x, w, None, 4, 1, (0, 0, 0, 0), g), [IMAGE, PATCH, GAIN]),
    "gelu_taylor": (ops.gelu_taylor, [STACK]),
    "layer_norm_taylor": (lambda x, w: ops.layer_norm_taylor(x, w), [STACK, GAIN]),
}
TRITON = ("window_attention", "window_attention bf16", "patch_merge", "patch_embed", "gelu_taylor")


def forward(case: str) -> Callable[[], object]:
    function, operands = CASES[case]
    return lambda: function(*operands)


def both(case: str) -> Callable[[], object]:
    function, operands = CASES[case]
    leaves = [x.clone().requires_grad_() for x in operands]
    gradient = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def calls(run: Callable[[], object]) -> tuple[int, int]:
    """Calls of functions in one run, and those of them made by kernels/; autograd's thread on a GPU is another one."""
    kernels, total, below, depth = str(Path(tile_table.__file__).parent), 0, 0, 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal total, below, depth
        if event in ("call", "c_call"):
            total, below = total + 1, below + (depth > 0)
        if event == "call" and (depth or frame.f_code.co_filename.startswith(kernels)):
            depth += 1
        elif event == "return" and depth:
            depth -= 1

    run()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return total, below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="store_true", help="the host's part of the Triton kernels")
    parser.add_argument("--rounds", type=int, default=15, help="turns per op (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    print_header(device)
    rows = []
    with ExitStack() as stack:
        if arguments.triton:
            from triton_cases import triton_not_started

            stack.enter_context(triton_not_started())
        names = TRITON if arguments.triton else CASES
        modes = {"forward": forward, "both": both}
        runs = {f"{case}, {mode}": make(case) for case in names for mode, make in modes.items()}
        counts = {name: calls(run) for name, run in runs.items()}
        for name, timing in compare(runs, device, arguments.rounds).items():
            low, middle, high = (1e6 * x for x in (timing.lower_quartile, timing.median, timing.upper_quartile))
            total, below = counts[name]
            print(f"{name:30} {middle:8.1f} us   {low:.1f} .. {high:.1f}   {total} calls, {below} of kernels/")
            rows.append(Row.of("host_time", name, "triton" if arguments.triton else "eager", timing, 0, 0.0))
    if arguments.csv is not None:
        save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
