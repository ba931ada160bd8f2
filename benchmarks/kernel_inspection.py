"""Compiles a Triton kernel for a GPU that need not be there, and reads machine code: what it uses, what its inner loop
does."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

# --------------------------------------------------------------------------- compiling


@dataclass(frozen=True)
class KernelReport:
    """The resources of one compiled kernel."""

    name: str
    capability: int  # 90 for sm_90
    registers: int  # per thread
    spilled_bytes: int  # local memory per thread; a frame that no instruction touches does not count
    shared_bytes: int  # per block
    warps: int  # per block
    cubin: bytes = field(repr=False)
    stack_pointer_uses: int = 0  # see the function of that name: must be 0

    @property
    def cubin_bytes(self) -> int:
        return len(self.cubin)


def compile_kernel(
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    divisible: Iterable[str] | None = None,
    **options: Any,
) -> KernelReport:
    """Compile `kernel` to a cubin for `capability` (80, 90, 100, ...) and report its resources; needs no GPU.

    Args:
        signature: type of each argument that is not a constant ("*fp32", "i64", ...).
        constants: value of each `tl.constexpr` argument.
        divisible: arguments that are multiples of 16; all pointers by default, as torch allocates.
        options: what a launch would be given (num_warps, enable_fp_fusion, ...).
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    if divisible is None:
        divisible = [name for name in kernel.arg_names if types[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    cubin = compiled.asm["cubin"]
    usage = resource_usage(cubin)[kernel.__name__]
    frame, body = usage["STACK"] + usage["LOCAL"], disassemble(cubin)[kernel.__name__]
    if frame and not any(class_of(i.name) == "local" for i in body):
        frame = 0
    metadata, wrong = compiled.metadata, len(stack_pointer_uses(body))
    return KernelReport(
        kernel.__name__, capability, usage["REG"], frame, metadata.shared, metadata.num_warps, cubin, wrong
    )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the compiler needs it."""

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, kernel: triton.JITFunction, values: tuple, named: dict[str, Any]) -> Launch:
        """The launch `kernel[grid](*values, **named)`: types, constants and divisibility as Triton finds them."""
        given = dict(zip(kernel.arg_names, values, strict=False)) | named
        signature, constants, divisible = {}, {}, []
        for parameter in kernel.params:
            value = given.get(parameter.name, parameter.default)
            kind = "constexpr"
            if not parameter.is_constexpr:
                kind = mangle_type(value, specialize=not parameter.do_not_specialize)
            if kind == "constexpr":
                constants[parameter.name] = value
                continue
            signature[parameter.name] = kind
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(parameter.name)
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        return cls(kernel.fn.__module__, kernel.__name__, signature, constants, tuple(divisible), options)

    def compile(self, capability: int) -> KernelReport:
        """For a GPU that need not be there."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        return compile_kernel(
            kernel, self.signature, self.constants, capability, divisible=self.divisible, **self.options
        )


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside the block kernels are not started: the list has what would have been. Outputs stay uninitialised."""
    launches: list[Launch] = []

    def record(kernel: triton.JITFunction, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(Launch.of(kernel, values, named))

    run, triton.JITFunction.run = triton.JITFunction.run, record
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


# --------------------------------------------------------------------------- reading cubins


@functools.cache
def cuobjdump() -> str:
    """The program that comes with Triton, or with the CUDA toolkit of CUDA_HOME or PATH. RuntimeError without any."""
    own = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    home = os.environ.get("CUDA_HOME")
    places = (str(own.parent), f"{home}/bin" if home else None, os.environ.get("PATH"))
    for place in places:
        found = shutil.which("cuobjdump", path=place) if place else None
        if found is not None:
            return found
    raise RuntimeError("cuobjdump is missing: neither Triton has it nor CUDA_HOME nor PATH")


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([cuobjdump(), option, str(path)], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED, LOCAL, ... of every function of a cubin."""
    found = re.findall(r"Function ([\w$.]+):\s*\n(.*)", _dump(cubin, "-res-usage"))
    return {name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)} for name, line in found}


def block_threads(cubin: bytes) -> dict[str, int]:
    """Threads per block of functions with __launch_bounds__."""
    pattern = r"\.nv\.info\.(\S+)|EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:\s*(0x\w+) (0x\w+) (0x\w+)"
    threads, function = {}, ""
    for name, *sides in re.findall(pattern, _dump(cubin, "-elf")):
        function = name or function
        if not name:
            threads[function] = math.prod(int(side, 16) for side in sides)
    return threads


@dataclass(frozen=True)
class Instruction:
    """One machine instruction (of every thread of a warp)."""

    address: int
    name: str  # with modifiers: LDG.E.128
    target: int | None = None  # of a branch
    conditional: bool = False
    operands: str = ""

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        return self.conditional or not self.name.startswith(("BRA", "BRX", "JMP", "EXIT", "RET"))


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of every function of a cubin."""
    return parse_sass(_dump(cubin, "-sass"))


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function in what `cuobjdump -sass` prints."""
    pattern = re.compile(r"Function : (\S+)|/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;/]*);")
    functions: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for function, address, predicate, name, operands in pattern.findall(text):
        if function:
            body = functions[function] = []
            continue
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith(("BRA", "JMP")) else None
        conditional = bool(predicate) or (target is not None and "," in operands)
        goal = int(target[1], 16) if target else None
        body.append(Instruction(int(address, 16), name, goal, conditional, operands.strip()))
    return functions


def stack_pointer_uses(body: list[Instruction]) -> list[Instruction]:
    """What computes with R1, the stack pointer, other than itself, or addresses behind it.

    No kernel of ours takes the address of something on the stack. Where one does, ptxas 12.8, of Triton 3.6, has lost a
    value and taken the stack pointer for it: the descriptor of a matrix, so that a product on an H100 read outside of
    shared memory. PRMT has it for bytes that nobody reads.
    """
    return [
        i for i in body
        if re.search(r"\bR1\b", re.sub(r"\[[^]]*\]", "", i.operands))
        and not re.match(r"R1\b", i.operands) and not i.name.startswith("PRMT")
    ]  # fmt: skip


# --------------------------------------------------------------------------- the inner loop

CLASSES = {  # of instructions, by the beginning of their names
    "tensor": r"[HIDQ]G?MMA|UTC\w*MMA",
    "mufu": r"MUFU",
    "fp32": r"F(FMA|ADD|MUL)2?\b",
    "shared": r"LDS|STS|ATOMS",
    "global": r"LDG|STG|UTMA|UBLKCP",
    "local": r"LDL|STL",
}
_CLASS = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in CLASSES.items()))


def class_of(name: str) -> str:
    """The key of CLASSES, or "other"."""
    found = _CLASS.match(name)
    return found.lastgroup or "other" if found else "other"


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, or of the whole kernel where nothing loops."""

    start: int | None  # address where a round starts; None: no loop
    end: int  # of the branch back to it
    mix: Counter[str]  # instructions of each class, per warp and round
    global_bytes: int  # that a full warp reads and writes

    @property
    def instructions(self) -> int:
        return self.mix.total()

    @property
    def found(self) -> str:
        """How, in words."""
        if self.start is None:
            return "no loop: the whole kernel"
        return f"branch at {self.end:#x} back to {self.start:#x}"


def inner_loop(body: list[Instruction]) -> Loop:
    """The innermost loop with the most MUFU (exponentials), then one that loads ahead (what cannot is for rare inputs,
    where there are both), then the most instructions of interest: all but "other" and "local".

    A loop is a branch back to an instruction that every way to the branch passes, with all that lies on ways between
    them; loops that only wait, without anything of interest, belong to the one around them. Both sides of a condition
    count.
    """
    blocks = _blocks(body)
    mixes = {first: Counter(class_of(i.name) for i in block) for first, block in blocks.items()}

    def interest(parts: frozenset[int]) -> int:
        return sum(count for part in parts for name, count in mixes[part].items() if name not in ("other", "local"))

    def rank(start: int) -> tuple[int, bool, int]:
        inside = [i.name for part in loops[start] for i in blocks[part]]
        ahead = any(name.startswith(("LDGSTS", "UTMA", "UBLKCP")) for name in inside)
        return sum(mixes[part]["mufu"] for part in loops[start]), ahead, interest(loops[start])

    loops = {start: parts for start, parts in _loops(blocks).items() if interest(parts)}
    innermost = [
        start for start, parts in loops.items() if not any(other in parts for other in loops if other != start)
    ]
    start = max(innermost, key=rank, default=None)
    inside = [i for part in sorted(blocks) if start is None or part in loops[start] for i in blocks[part]]
    end = max(i.address for i in inside if start is None or i.target == start)
    return Loop(start, end, Counter(class_of(i.name) for i in inside), sum(_bytes(i.name) for i in inside))


def _blocks(body: list[Instruction]) -> dict[int, list[Instruction]]:
    """Instructions that follow each other whatever happens, by the address of the first."""
    heads = {body[0].address} | {i.target for i in body if i.target is not None}
    heads |= {after.address for i, after in itertools.pairwise(body) if i.target is not None or not i.falls_through}
    blocks: dict[int, list[Instruction]] = {}
    for instruction in body:
        if instruction.address in heads:
            block = blocks[instruction.address] = []
        block.append(instruction)
    return blocks


def _loops(blocks: dict[int, list[Instruction]]) -> dict[int, frozenset[int]]:
    """The blocks of each loop, by where it starts (Aho, Lam, Sethi and Ullman, Compilers, 9.6: natural loops)."""
    order = sorted(blocks)
    following = dict(itertools.pairwise(order))
    after = {
        first: [t for t in (block[-1].target, following.get(first) if block[-1].falls_through else None) if t in blocks]
        for first, block in blocks.items()
    }
    before: dict[int, list[int]] = {first: [] for first in order}
    for first, targets in after.items():
        for target in targets:
            before[target].append(first)
    everything = frozenset(order)
    dominators = dict.fromkeys(order, everything) | {order[0]: frozenset(order[:1])}
    changed = True
    while changed:
        changed = False
        for first in order[1:]:
            known = frozenset.intersection(everything, *(dominators[b] for b in before[first])) | {first}
            changed |= known != dominators[first]
            dominators[first] = known
    loops: dict[int, frozenset[int]] = {}
    for last, targets in after.items():
        for start in targets:
            if start in dominators[last] and dominators[last] != everything:  # all dominate what nothing reaches
                loops[start] = loops.get(start, frozenset()) | _between(start, last, before)
    return loops


def _between(start: int, last: int, before: dict[int, list[int]]) -> frozenset[int]:
    """The blocks from which `last` is reached without passing `start`, and both."""
    inside, todo = {start, last}, [last] if last != start else []
    while todo:
        new = [first for first in before[todo.pop()] if first not in inside]
        inside.update(new)
        todo += new
    return frozenset(inside)


def _bytes(name: str) -> int:
    """Bytes that a full warp moves from or to global memory with one instruction."""
    if not name.startswith(("LDG", "STG")):
        return 0
    width = re.search(r"\.(?:[US]?(8|16)|(64|128|256))\b", name)
    return 32 * (int(width[1] or width[2]) if width else 32) // 8
