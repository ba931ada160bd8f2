"""``asvit-fast env``: what this installation is and can do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from .options import Command, Option, choice, flag

BACKENDS = ("reference", "triton", "cuda", "cpu")
EXIT_UNAVAILABLE = 1


def run(values: SimpleNamespace) -> int:
    from ..environment import environment, format_environment
    from ..files import to_json

    state = environment()
    print(to_json(state, indent=2) if values.json else format_environment(state))
    if values.require is None:
        return 0
    reason = unavailable(state, values.require)
    if reason is None:
        return 0
    print(f"asvit-fast: {values.require} is not available: {reason}", file=sys.stderr)
    return EXIT_UNAVAILABLE


def unavailable(state: dict[str, Any], backend: str) -> str | None:
    """None when every op that has this backend can run it on some device here, otherwise the first reason why not."""
    from ..backends import declared

    ops = [op for op, backends in declared().items() if backend in backends]
    for op in ops:
        reasons = [devices[backend] for devices in state["ops"][op].values()]
        if None not in reasons:
            return f"{op}: {reasons[-1]}"
    return None if ops else "no op has it"


COMMAND = Command(
    name="env",
    summary="Print versions, the build report, and every op with every backend: available, or the reason it is not.",
    options=(
        Option("json", flag, False, "print strict JSON on stdout", flag=True),
        Option("require", choice(*BACKENDS), None, f"exit with 1 unless it can run: {', '.join(BACKENDS)}", "NAME"),
    ),
    run=run,
    needs="torch",
    epilog="example: asvit-fast env --require cuda && asvit-fast search ...",
)
