"""``python -m asvit_fast`` and ``asvit-fast``: the same program."""

import sys

from .errors import EXIT_INTERRUPTED


def main() -> int:
    """Run the command line; also while it is still being loaded, Ctrl-C ends it without a traceback."""
    try:
        from .cli import main
        from .malloc import tune_allocator

        if sys.argv[1:2] != ["bench"]:  # it measures what other programs would
            tune_allocator()
        return main()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
