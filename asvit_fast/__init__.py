"""asvit_fast: design, score, scale and accelerate vision transformers. Source of the method: As-ViT (arXiv
2202.11921).

The public names stand in ``__init__.pyi`` and load when they are first used: the command line answers before torch is
there, and ``import asvit_fast`` costs milliseconds.
"""

import lazy_loader

from ._registration import register_on_import
from ._version import __version__ as __version__

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    value = _load(name)
    register_on_import()
    return value


register_on_import()
