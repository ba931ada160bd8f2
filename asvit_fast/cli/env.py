"""``asvit-fast env``: what this installation is and can do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from ..environment import environment, show_config
from ..files import to_json
from ..settings import BACKENDS, check_choice

EXIT_UNAVAILABLE = 1


def run(values: SimpleNamespace) -> int:
    """Print what needs no torch at once, then the rest; exit code 1 where torch or what is required is missing."""
    if values.require is not None:
        check_choice("require", values.require, BACKENDS)
    try:
        if values.json:
            print(to_json(environment(), indent=2))
        else:
            show_config()
    except ImportError as error:
        print(f"asvit-fast: torch cannot be imported: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    reason = None if values.require is None else unavailable(environment(), values.require)
    if reason is None:
        return 0
    print(f"asvit-fast: {values.require} is not available: {reason}", file=sys.stderr)
    return EXIT_UNAVAILABLE


def unavailable(state: dict[str, Any], backend: str) -> str | None:
    """None when every op that has this backend can run it on some device here, otherwise the first reason why not."""
    from ..backends import declared

    ops = [op for op, backends in declared().items() if backend in backends]
    if backend in ("triton", "cuda") and not state["gpus"]:
        return "torch sees no CUDA GPU here"
    for op in ops:
        reasons = [devices[backend] for devices in state["ops"][op].values()]
        if None not in reasons:
            return f"{op}: {reasons[-1]}"
    return None if ops else "no op has it"
