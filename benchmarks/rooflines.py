"""Peak rates of GPUs: multiprocessors, clocks and rates, how many warps fit, how long a loop's round takes."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_inspection import Loop

SCHEDULERS = 4  # of a multiprocessor, each issues one instruction of one warp per clock
MUFU_LANES = 16  # results per clock and multiprocessor
REGISTERS, REGISTER_UNIT = 65536, 256  # 32-bit, per multiprocessor; a warp gets a multiple of the unit
MAX_WARPS, MAX_BLOCKS = 64, 32
RESERVED_SHARED = 1024  # bytes of each block, for the system


@dataclass(frozen=True)
class GPU:
    """Rates per second of a whole GPU, dense, at the clock where its tensor cores reach the data sheet's rate."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float  # bytes of device memory
    tensor_16: float  # operations in float16 and bfloat16
    tensor_32: float  # in TF32
    fp32_lanes: int  # per multiprocessor
    shared: int  # bytes per multiprocessor
    source: str

    @property
    def exponentials(self) -> float:
        """Per second."""
        return self.multiprocessors * MUFU_LANES * self.clock


_GUIDE = (
    "lanes and limits per multiprocessor: CUDA C++ Programming Guide, arithmetic throughput and compute capabilities"
)
GPUS = {
    80: GPU("A100 80GB SXM", 108, 1.41e9, 2.039e12, 312e12, 156e12, 64, 164 * 1024,
            f"NVIDIA A100 data sheet and A100 architecture white paper; {_GUIDE}"),
    90: GPU("H200 SXM", 132, 1.83e9, 4.8e12, 989e12, 494e12, 128, 228 * 1024,
            f"NVIDIA H200 data sheet and H100 architecture white paper; {_GUIDE}"),
    100: GPU("B200 SXM", 148, 1.85e9, 8.0e12, 2250e12, 1125e12, 128, 228 * 1024,
             f"NVIDIA Blackwell architecture brief and HGX B200 data sheet; {_GUIDE}"),
}  # fmt: skip


def occupancy(gpu: GPU, registers: int, shared_bytes: int, warps: int) -> float:
    """Share of a multiprocessor's warp slots that are taken when it is full of such blocks."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // per_warp // warps if registers else MAX_BLOCKS
    by_shared = gpu.shared // (shared_bytes + RESERVED_SHARED)
    return min(by_registers, by_shared, MAX_WARPS // warps, MAX_BLOCKS) * warps / MAX_WARPS


@dataclass(frozen=True)
class Work:
    """Work per unit ("score", "byte"), and how many units a block does per round of its loop."""

    unit: str
    units: float
    exponentials: float = 0.0
    operations: float = 0.0  # of tensor cores
    bytes: float = 0.0  # of device memory, each value once


@dataclass(frozen=True)
class Bounds:
    """Picoseconds per unit on the whole GPU: of the loop as it is, and what no kernel can be faster than."""

    issue: float  # every instruction of the loop
    pipes: float  # its MUFU and float32 instructions, each on its own units
    exponential: float
    tensor: float
    memory: float

    @property
    def roofline(self) -> float:
        return max(self.exponential, self.tensor, self.memory)


def bounds(gpu: GPU, loop: Loop, warps: int, work: Work, half: bool) -> Bounds:
    """Rate of a loop that blocks of `warps` warps run, with the whole GPU full of them."""

    def picoseconds(clocks: float) -> float:
        return 1e12 * clocks * warps / (gpu.multiprocessors * gpu.clock * work.units) if work.units else 0.0

    mufu, fp32 = loop.mix["mufu"] * 32 / MUFU_LANES, loop.mix["fp32"] * 32 / gpu.fp32_lanes
    return Bounds(
        issue=picoseconds(loop.instructions / SCHEDULERS),
        pipes=picoseconds(max(mufu, fp32)),
        exponential=1e12 * work.exponentials / gpu.exponentials,
        tensor=1e12 * work.operations / (gpu.tensor_16 if half else gpu.tensor_32),
        memory=1e12 * work.bytes / gpu.bandwidth,
    )
