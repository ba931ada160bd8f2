"""``python -m asvit_fast.timm SCRIPT ARGS``: see ``training.timm_scripts``."""

from .training.timm_scripts import main

if __name__ == "__main__":
    raise SystemExit(main())
