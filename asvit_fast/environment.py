"""Facts about this installation: versions, GPUs, the build report, and every op with every backend."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from . import _extension, backends, ops  # noqa: F401  (every op declares its backends)
from .machine import processor

PACKAGES = ("asvit-fast", "torch", "torchvision", "triton", "timm", "numpy")


def environment() -> dict[str, Any]:
    """Everything that `show_config` prints, as plain values for JSON.

    Keys: "versions", "cpu", "gpus", "build" (the build report), "extension", "strict", and "ops": op -> device type ->
    backend -> None if it is available there, otherwise the reason why not.
    """
    return {
        "versions": _versions(),
        "cpu": {
            "name": processor(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": _gpus(),
        "build": _extension.build_report(),
        "extension": _extension_state(),
        "ops": _ops(),
        "strict": backends.strict(),
    }


def show_config() -> None:
    """Print `environment()` as text: versions, GPUs, compiled instruction sets and archs, every op x backend."""
    print(format_environment(environment()))


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions | {"torch": torch.__version__, "cuda of torch": torch.version.cuda}


def _gpus() -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = map(torch.cuda.get_device_properties, range(count))
    return [{"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory} for gpu in gpus]


def _extension_state() -> dict[str, Any]:
    module = _extension.extension()
    if module is None:
        return {"loaded": False, "reason": _extension.reason()}
    return {
        "loaded": True,
        "isas compiled": module.compiled_isas(),
        "isas available": module.available_isas(),
        "isa active": module.get_isa(),
        "cuda reason": _extension.cuda_reason(),
    }


def _ops() -> dict[str, dict[str, dict[str, str | None]]]:
    devices = {"cpu": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
    return {
        op: {
            kind: {backend: backends.available(op, backend, device) for backend in backends.BACKENDS}
            for kind, device in devices.items()
        }
        for op in sorted(backends.declared())
    }


# --------------------------------------------------------------------------- text


def format_environment(state: dict[str, Any]) -> str:
    """The text of `show_config` for a result of `environment`."""
    sections = [
        ("Versions", [(name, version or "not installed") for name, version in state["versions"].items()]),
        ("Machine", _machine_rows(state)),
        ("Compiled extension", _extension_rows(state)),
    ]
    for op, devices in state["ops"].items():
        for device, reasons in devices.items():
            verdicts = [(name, f"no: {reason}" if reason else "available") for name, reason in reasons.items()]
            sections.append((f"{op} on {device}", verdicts))
    return "\n\n".join(_section(title, rows) for title, rows in sections)


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _machine_rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = state["cpu"]
    rows = [("cpu", f"{cpu['name']}, {cpu['threads']} threads, torch uses {cpu['capability']}")]
    gpus = [f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB" for gpu in state["gpus"]]
    rows += [(f"cuda:{index}", gpu) for index, gpu in enumerate(gpus)]
    return rows if gpus else [*rows, ("gpu", "none that torch can use")]


def _extension_rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    extension, build = state["extension"], state["build"]
    if not extension["loaded"]:
        rows = [("state", f"not loaded: {extension['reason']}")]
    else:
        rows = [
            ("state", "loaded"),
            ("instruction sets", f"{', '.join(extension['isas compiled'])} (active: {extension['isa active']})"),
            ("cuda kernels", extension["cuda reason"] or "compiled"),
        ]
    shown = {
        "mode": "built with ASVIT_FAST_BUILD",
        "torch": "built for torch",
        "cuda": "built with CUDA",
        "archs": "built for archs",
        "compiler": "compiler",
        "cxx_flags": "C++ flags",
        "nvcc_flags": "nvcc flags",
    }
    values = {name: build[key] for key, name in shown.items() if build.get(key)}
    return rows + [(name, " ".join(v) if isinstance(v, list) else str(v)) for name, v in values.items()]
