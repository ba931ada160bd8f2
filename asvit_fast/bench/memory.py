"""How much memory there is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take before it is killed; None where nobody says, or an error will."""
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    limits = [int(found[1]) * 1024] if found else []
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        if limit != "max":
            limits.append(int(limit) - int(used) + int(cached[1] if cached else 0))
    except (OSError, ValueError):  # no container, or of version 1
        pass
    return min(limits, default=None)
