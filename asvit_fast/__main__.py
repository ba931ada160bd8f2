"""``python -m asvit_fast`` is the same program as ``asvit-fast``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
