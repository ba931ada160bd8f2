"""Facts about this installation: versions, processor, the build report, then what torch and the ops can do here."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
from importlib import metadata
from pathlib import Path
from typing import Any

from ._build import build_report
from .machine import processor

PACKAGES = ("asvit-fast", "torch", "torchvision", "triton", "timm", "numpy", "transformers", "monai", "onnxruntime")
VARIABLES = (  # of the environment: what changes results or speed
    "ASVIT_FAST_BUILD", "ASVIT_FAST_MEMORY_SHARE", "ASVIT_FAST_STRICT", "ASVIT_FAST_TILES", "CI",
    "CUDA_VISIBLE_DEVICES", "KMP_AFFINITY", "LD_PRELOAD", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "TIMM_FUSED_ATTN",
    "TRITON_INTERPRET",
)  # fmt: skip
BUILD_FACTS = {
    "mode": "built with ASVIT_FAST_BUILD",
    "torch": "built with torch",
    "oldest torch": "runs from torch",
    "cuda": "built with CUDA",
    "archs": "built for archs",
    "compiler": "compiler",
    "cxx_flags": "C++ flags",
    "nvcc_flags": "nvcc flags",
    "reason": "not compiled",
}


def installation() -> dict[str, Any]:
    """ "versions", "system", "cpu" (name, machine), "variables" (those that are set of ``VARIABLES``) and "build" (the
    build report), without importing torch."""
    cpu = {"name": processor(), "machine": platform.machine()}
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    system = {"system": platform.platform(), "cpu": cpu, "variables": variables}
    return {"versions": _versions(), **system, "build": build_report()}


def environment() -> dict[str, Any]:
    """Everything that `show_config` prints, as plain values for JSON.

    Keys: "versions", "system", "cpu", "variables", "gpus", "build" (the build report), "extension", "strict", "ops":
    op -> device type -> backend -> None if it is available there, otherwise the reason why not.
    """
    from .capabilities import capabilities  # and torch, which takes seconds

    static, found = installation(), capabilities()
    return {**static, **found, "cpu": {**static["cpu"], **found["cpu"]}}


def show_config() -> None:
    """Print `environment()` as text: versions, GPUs, compiled instruction sets and archs, every op x backend.

    What needs no torch comes first and at once: also where torch cannot be imported.

    Examples:
        >>> import asvit_fast as af
        >>> af.show_config()  # doctest: +ELLIPSIS
        Versions
          python ...
    """
    print(format_installation(installation()), end="\n\n", flush=True)
    print(format_capabilities(environment()))


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions | _torch_version()


def _torch_version() -> dict[str, str | None]:
    """With the build that it is, which its metadata do not say."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {"torch": None, "cuda of torch": None}
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return {"torch": facts["__version__"], "cuda of torch": facts["cuda"]}


# --------------------------------------------------------------------------- text


def format_environment(state: dict[str, Any]) -> str:
    """The text of `show_config` for a result of `environment`."""
    return f"{format_installation(state)}\n\n{format_capabilities(state)}"


def format_installation(state: dict[str, Any]) -> str:
    """The part of it for a result of `installation`."""
    build = {name: state["build"][key] for key, name in BUILD_FACTS.items() if state["build"].get(key)}
    rows = [(name, " ".join(value) if isinstance(value, list) else str(value)) for name, value in build.items()]
    return "\n\n".join((
        _section("Versions", [(name, version or "not installed") for name, version in state["versions"].items()]),
        _section("Machine", [("system", state["system"]), ("cpu", state["cpu"]["name"]), *state["variables"].items()]),
        _section("Build of the extension", rows or [("state", "never built")]),
    ))  # fmt: skip


def format_capabilities(state: dict[str, Any]) -> str:
    """The part of it for a result of `capabilities`."""
    sections = [("Devices", _device_rows(state)), ("Compiled extension", _extension_rows(state["extension"]))]
    for op, devices in state["ops"].items():
        for device, reasons in devices.items():
            verdicts = [(name, f"no: {reason}" if reason else "available") for name, reason in reasons.items()]
            sections.append((f"{op} on {device}", verdicts))
    return "\n\n".join(_section(title, rows) for title, rows in sections)


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _device_rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = state["cpu"]
    rows = [("cpu", f"{cpu['threads']} threads, torch uses {cpu['capability']}")]
    gpus = [f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB" for gpu in state["gpus"]]
    rows += [(f"cuda:{index}", gpu) for index, gpu in enumerate(gpus)]
    return rows if gpus else [*rows, ("gpu", "none that torch can use")]


def _extension_rows(extension: dict[str, Any]) -> list[tuple[str, str]]:
    if not extension["loaded"]:
        return [("state", f"not loaded: {extension['reason']}")]
    return [
        ("state", "loaded"),
        ("instruction sets", f"{', '.join(extension['isas compiled'])} (active: {extension['isa active']})"),
        ("cuda kernels", extension["cuda reason"] or "compiled"),
    ]
