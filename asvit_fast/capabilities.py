"""Capabilities of this process: GPUs, the compiled extension, every op with every backend. Needs torch."""

from __future__ import annotations

from typing import Any

import torch

from . import _extension, backends, ops  # noqa: F401  (every op declares its backends)


def capabilities() -> dict[str, Any]:
    """ "cpu" (threads, capability), "gpus", "extension", "strict", "ops": see ``environment``."""
    cpu = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    extension, strict = _extension_state(), backends.strict()
    return {"cpu": cpu, "gpus": _gpus(), "extension": extension, "ops": _ops(), "strict": strict}


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
