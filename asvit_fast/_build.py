"""The record that the build of the compiled extension leaves."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def build_report() -> dict[str, Any]:
    """Torch, CUDA, archs, compiler, flags, or why nothing was compiled; {} if not built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.is_file() else {}
