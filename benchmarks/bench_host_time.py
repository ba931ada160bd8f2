"""What a call of an op costs besides its kernel: tiny inputs, eager, forward and forward with backward.

    python benchmarks/bench_host_time.py [--csv FILE]

Beside torch's functions of about the same form. One thread, all in turn. The compiled kernels themselves take about a
microsecond on these inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timer import Row, compare, print_header, save_rows
from torch import Tensor

from asvit_fast import ops

QKV, WEIGHT = torch.randn(1, 4, 4, 24), torch.randn(8, 8)
TOKENS, MERGE, NORM = torch.randn(1, 4, 4, 4), torch.randn(8, 16), torch.randn(16)
IMAGE, PATCH, GAIN = torch.randn(1, 3, 8, 8), torch.randn(8, 3, 4, 4), torch.randn(8)
STACK = torch.randn(3, 4, 8)
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "F.linear": (F.linear, [STACK, WEIGHT]),
    "F.layer_norm": (lambda x, w: F.layer_norm(x, (8,), w), [STACK, GAIN]),
    "window_attention": (lambda qkv: ops.window_attention(qkv, 2, (2, 2), (1, 1)), [QKV]),
    "patch_merge": (lambda x, w, g: ops.patch_merge(x, w, 2, 2, g), [TOKENS, MERGE, NORM]),
    "patch_embed": (lambda x, w, g: ops.patch_embed(x, w, None, 4, 1, (0, 0, 0, 0), g), [IMAGE, PATCH, GAIN]),
    "gelu_taylor": (ops.gelu_taylor, [STACK]),
    "layer_norm_taylor": (lambda x, w: ops.layer_norm_taylor(x, w), [STACK, GAIN]),
}


def forward(case: str) -> Callable[[], object]:
    function, operands = CASES[case]
    return lambda: function(*operands)


def both(case: str) -> Callable[[], object]:
    function, operands = CASES[case]
    leaves = [x.clone().requires_grad_() for x in operands]
    gradient = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns per op (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    print_header(device)
    runs = {f"{case}, {mode}": make(case) for case in CASES for mode, make in (("forward", forward), ("both", both))}
    rows = []
    for name, timing in compare(runs, device, arguments.rounds).items():
        low, middle, high = (1e6 * x for x in (timing.lower_quartile, timing.median, timing.upper_quartile))
        print(f"{name:28} {middle:8.1f} us   {low:.1f} .. {high:.1f}")
        rows.append(Row.of("host_time", name, "eager", timing, 0, 0.0))
    if arguments.csv is not None:
        save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
