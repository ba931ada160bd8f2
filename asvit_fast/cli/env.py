"""``asvit-fast env``: what this installation is and can do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from ..backends import BACKENDS, declared
from ..environment import environment, format_environment
from ..files import to_json
from ..settings import check_choice

EXIT_UNAVAILABLE = 1


def run(values: SimpleNamespace) -> int:
    if values.require is not None:
        check_choice("require", values.require, BACKENDS)
    state = environment()
    print(to_json(state, indent=2) if values.json else format_environment(state))
    reason = None if values.require is None else unavailable(state, values.require)
    if reason is None:
        return 0
    print(f"asvit-fast: {values.require} is not available: {reason}", file=sys.stderr)
    return EXIT_UNAVAILABLE


def unavailable(state: dict[str, Any], backend: str) -> str | None:
    """None when every op that has this backend can run it on some device here, otherwise the first reason why not."""
    ops = [op for op, backends in declared().items() if backend in backends]
    for op in ops:
        reasons = [devices[backend] for devices in state["ops"][op].values()]
        if None not in reasons:
            return f"{op}: {reasons[-1]}"
    return None if ops else "no op has it"
