"""What a machine is and what it can do at best: versions, copy bandwidth, rates of large matrix products.

python benchmarks/gpu_machine.py [--device cuda] [--json FILE]     # all of it
python benchmarks/gpu_machine.py --facts                           # GPU, driver, torch, Triton; as JSON
python benchmarks/gpu_machine.py --arch                            # 9.0, as TORCH_CUDA_ARCH_LIST takes it
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from asvit_fast import backends
from asvit_fast.bench.rooflines import copy_bandwidth, product_peak
from asvit_fast.files import to_json, write_atomic

PACKAGES = ("numpy", "timm", "torchvision", "transformers", "monai", "pytest", "pytest-xdist", "setuptools", "ninja")
PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def version(package: str) -> str | None:
    """None for one that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """The last line that a program prints; None where it is missing or fails."""
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/local/cuda/bin")
    if program is None:
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


def facts() -> dict[str, str | None]:
    """What a figure depends on most."""
    there = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if there else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if there else None,
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def arch() -> str:
    """Capability of the GPU, "9.0"; empty without one."""
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written, in GB/s; rates of products in TFLOP/s."""
    found = {"copy GB/s": copy_bandwidth(device, torch.get_num_threads()) / 1e9}
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    for name, dtype in PRODUCTS.items() if device.type == "cuda" else [("fp32", torch.float32)]:
        switch.allow_tf32 = name == "tf32"
        product_peak.cache_clear()  # which does not know of the switch
        found[f"{name} TFLOP/s"] = 2 * product_peak(dtype, device, torch.get_num_threads()).macs / 1e12
    switch.allow_tf32 = before
    product_peak.cache_clear()
    return {name: round(value, 2) for name, value in found.items()}


def everything(device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {
        **facts(),
        "capability": arch() or None,
        "python": platform.python_version(),
        "cuda of torch": torch.version.cuda,
        "nvcc": output_of("nvcc", "--version"),
        "compute-sanitizer": output_of("compute-sanitizer", "--version"),
        **{package: version(package) for package in PACKAGES},
    }
    if device.type == "cuda":
        properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
        found |= {"multiprocessors": properties.multi_processor_count, "L2 MiB": properties.L2_cache_size / 2**20}
        found |= {"memory GiB": round(total / 2**30, 1), "free GiB": round(free / 2**30, 1)}
    return found | ceilings(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", type=Path, default=None, help="write it to this file, too")
    parser.add_argument("--facts", action="store_true")
    parser.add_argument("--arch", action="store_true")
    arguments = parser.parse_args()
    if arguments.facts or arguments.arch:
        print(to_json(facts()) if arguments.facts else arch())
        return
    found = everything(backends.resolve_device(arguments.device))
    print("\n".join(f"{name:20} {'not there' if value is None else value}" for name, value in found.items()))
    if arguments.json is not None:
        write_atomic(arguments.json, to_json(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
