"""Default values that a signature takes from a class of settings, as numbers and text in the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

from asvit_fast import recipe, settings

FIELD = re.compile(r"(\w+)\.(\w+)")  # such as ScoreSettings.repeats


class Defaults(griffe.Extension):
    """Replaces ``ScoreSettings.repeats`` by ``5``."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        for parameter in func.parameters:
            if found := FIELD.fullmatch(str(parameter.default)):
                owner = getattr(settings, found[1], None) or getattr(recipe, found[1], None)
                if owner is not None and hasattr(owner, found[2]):
                    parameter.default = repr(getattr(owner, found[2]))
