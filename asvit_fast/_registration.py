"""Our ops are known to torch, and our networks to timm, after ``import asvit_fast``, in whatever order they are
imported.

``torch.export.load`` needs the ops and ``timm.create_model("asvit")`` the networks, and neither mentions us. Importing
torch and timm for it would take seconds that a script, a worker process or ``asvit-fast --help`` may never need: they
bring ours along when they are imported themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERED_WITH = {"torch": "asvit_fast.ops", "timm": "asvit_fast.models"}  # their package -> ours that registers there


def register_on_import() -> None:
    """Import what registers with the packages that are loaded, now; with the others, as soon as they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for theirs in REGISTERED_WITH:
        if theirs in sys.modules and not _is_loading(theirs):
            _register(theirs)


def _register(theirs: str) -> None:
    """Import ours, unless a module of ours is being imported, which may be the one that needs torch first: what it
    belongs to registers when it is complete."""
    if not any(name.startswith(f"{__package__}.") and _is_loading(name) for name in list(sys.modules)):
        importlib.import_module(REGISTERED_WITH[theirs])


def _is_loading(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and lets the import of ours follow."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTERED_WITH or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            own, execute = vars(spec.loader), spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del own["exec_module"]  # from here on as if nobody had stood between
                execute(module)
                _register(fullname)

            own["exec_module"] = exec_module
        return spec
