"""The processor, which stands beside every figure and every run."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_ZEN_4 = (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0))  # models of AMD's family 25; the others are Zen 3
_ZEN_2 = (*range(0x30, 0x50), *range(0x60, 0x80), *range(0x90, 0xB0))  # of family 23; the others are Zen and Zen+


def processor() -> str:
    """Name of the CPU, AMD's with their generation, as a name such as "AMD EPYC" may hide it, and its cores."""
    fields = _fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    generation = _generation(fields)
    return f"{name}{f' ({generation})' if generation else ''}, {os.cpu_count()} cores"


@cache
def mkl_is_narrow() -> bool:
    """Whether MKL's products take twice the time they need: on AMD's processors it uses vectors of 256 bits, which cost
    nothing up to Zen 4, where wider ones go through in halves."""
    fields = _fields()
    return fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", 0)) >= 26


@cache
def _fields() -> dict[str, str]:
    """What the system says of its first processor."""
    if not _CPUINFO.exists():
        return {}
    first = _CPUINFO.read_text().partition("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _generation(fields: dict[str, str]) -> str:
    if fields.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(fields.get("cpu family", 0)), int(fields.get("model", 0))
    zen = {23: "Zen 2" if model in _ZEN_2 else "Zen", 25: "Zen 4" if model in _ZEN_4 else "Zen 3", 26: "Zen 5"}
    return zen.get(family, f"family {family}")
