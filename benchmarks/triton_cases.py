"""What the Triton kernels are compiled with: the shapes of real networks, and the work of each round of their loops.

A new kernel is an entry of KERNELS: where it is, its shapes, and a function that says its arguments.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rooflines import Work

from asvit_fast.kernels.inspection import KernelReport, compile_kernel
from asvit_fast.kernels.tiles import block, choose
from asvit_fast.tuning import Workload

Shape = Mapping[str, int]
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}


@dataclass(frozen=True)
class Arguments:
    """Of one compilation; names that a kernel has no parameter for are left out."""

    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    work: Work


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel: `module` of asvit_fast.kernels, its `function`, the `shapes` and what it is compiled with."""

    name: str
    module: str
    function: str
    shapes: tuple[Shape, ...]
    arguments: Callable[[Kernel, Shape, str, int], Arguments]  # of kernel, shape, dtype, arch
    products: int = 0  # of matrices per score
    tensors: int = 0  # [tokens, head_dim] per head that it reads and writes
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Case:
    """One compilation."""

    kernel: Kernel
    shape: Shape
    dtype: str
    arch: int

    @property
    def label(self) -> str:
        """As `--shape` takes it: "N=49 d=8"."""
        return " ".join(f"{name}={value}" for name, value in self.shape.items())

    def compile(self) -> tuple[KernelReport, Work]:
        """Compile it; needs no GPU."""
        function = getattr(importlib.import_module(f"asvit_fast.kernels.{self.kernel.module}"), self.kernel.function)
        given = self.kernel.arguments(self.kernel, self.shape, self.dtype, self.arch)
        known = set(function.arg_names)
        missing = known - set(given.signature) - set(given.constants)
        if missing:
            raise RuntimeError(f"{self.kernel.function} has parameters that its entry in KERNELS lacks: {missing}")
        signature, constants = (
            {name: value for name, value in part.items() if name in known}
            for part in (given.signature, given.constants)
        )
        return compile_kernel(function, signature, constants, self.arch, **given.options), given.work


# --------------------------------------------------------------------------- windowed attention

HEADS = 4

PAPER = [  # windows and heads of As-ViT's topologies (arXiv 2202.11921, Table 4), without bias or shift
    {"N": tokens, "d": head_dim, "bias": 0} for tokens in (49, 196, 784) for head_dim in (4, 8, 16, 22, 29, 32, 45)
]
SWIN = [{"N": tokens, "d": 32, "bias": 1} for tokens in (49, 64, 144)]  # with bias, and half of the blocks shifted


def workload(shape: Shape, dtype: str) -> Workload:
    """Windows of N tokens, a square, and heads of d channels; with a bias the maps are shifted, too."""
    side = round(shape["N"] ** 0.5)
    return Workload((side, side), shape["d"], biased=bool(shape["bias"]), dtype=dtype)


def window_attention(kernel: Kernel, shape: Shape, dtype: str, arch: int) -> Arguments:
    """Of `workload`, for HEADS heads; with a bias also with a mask."""
    call = workload(shape, dtype)
    tokens, head_dim, biased = call.tokens, call.head_dim, call.biased
    options = choose(kernel.name, str(arch), tokens, head_dim, BITS[dtype])
    constants = {"HEADS": HEADS, "HEAD_DIM": head_dim, "BLOCK_D": block(head_dim), "BLOCK": block(tokens)}
    constants |= {"WINDOW_ROWS": call.window[0], "WINDOW_COLUMNS": call.window[1], "PRECISION": "tf32x3"}
    constants |= {"BIASED": biased, "BIAS_GRADIENT": biased}
    constants["MASKED"] = biased or (kernel.name.startswith("whole") and tokens < block(tokens))
    constants |= {name: value for name, value in options.items() if name.isupper()}
    pointers = dict.fromkeys(("qkv", "output", "gradient", "to_qkv"), f"*{dtype}")
    pointers |= dict.fromkeys(("bias", "largest", "inverse", "delta", "to_bias"), "*fp32")
    signature = {f"{name}_pointer": value for name, value in pointers.items()}
    sizes = ("windows", "per_program", "height", "width", "shift_rows", "shift_columns")
    signature |= dict.fromkeys(sizes, "i32") | {"scale": "fp32"}
    scores = min(options.get("BLOCK_M", tokens), tokens) * min(options.get("BLOCK_N", tokens), tokens)
    work = Work(
        "score",
        scores,
        exponentials=1.0,
        operations=2.0 * kernel.products * head_dim * (3 if dtype == "fp32" else 1),  # three TF32 products are one
        bytes=kernel.tensors * head_dim * BITS[dtype] / 8 / tokens,
    )
    return Arguments(signature, constants, {k: v for k, v in options.items() if not k.isupper()}, work)


def _attention(name: str, module: str, products: int, tensors: int, shapes: list[Shape]) -> Kernel:
    return Kernel(name, module, f"window_attention_{name}_kernel", tuple(shapes), window_attention, products, tensors)


# --------------------------------------------------------------------------- elementwise

GELU = [
    {"orders": orders, "tanh": tanh, "bias": bias}
    for orders, tanh, bias in itertools.product((0, 1, 2), (0, 1), (0, 1))
]


def gelu_taylor(kernel: Kernel, shape: Shape, dtype: str, arch: int) -> Arguments:
    """Rows of orders 0 to `orders`."""
    from asvit_fast.kernels.gelu_taylor import BLOCK, OPTIONS

    signature = {f"{name}_pointer": f"*{dtype}" for name in ("input", "output", "bias")}
    signature |= {"count": "i64", "channels": "i64"}
    constants = {"ORDERS": shape["orders"], "TANH": bool(shape["tanh"]), "BIASED": bool(shape["bias"]), "BLOCK": BLOCK}
    moved = 2 * (shape["orders"] + 1) * BITS[dtype] / 8  # bytes of a column
    return Arguments(signature, constants, OPTIONS, Work("byte", BLOCK * moved, exponentials=1 / moved, bytes=1.0))


# --------------------------------------------------------------------------- all of them

ATTENTION = [*PAPER, *SWIN]
KERNELS = (
    _attention("whole", "window_attention", 2, 4, ATTENTION),
    _attention("whole_backward", "window_attention", 5, 7, ATTENTION),
    _attention("blocked", "window_attention_large", 2, 4, ATTENTION),
    _attention("q_gradient", "window_attention_large", 3, 6, ATTENTION),
    _attention("kv_gradient", "window_attention_large", 4, 6, ATTENTION),
    _attention("bias_gradient", "window_attention_large", 2, 4, SWIN),
    Kernel("gelu_taylor", "gelu_taylor", "gelu_taylor_kernel", tuple(GELU), gelu_taylor),
)


def _runs(kernel: Kernel, shape: Shape, dtype: str) -> bool:
    """Whether the op starts this kernel for the shape."""
    return kernel.arguments is not window_attention or kernel.name in workload(shape, dtype).kernels


def cases(archs: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every kernel on every shape that it runs on."""
    for kernel, dtype in itertools.product(KERNELS, dtypes):
        for shape, arch in itertools.product(kernel.shapes, archs):
            if dtype in kernel.dtypes and _runs(kernel, shape, dtype):
                yield Case(kernel, shape, dtype, arch)
