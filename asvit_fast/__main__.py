"""``python -m asvit_fast`` and ``asvit-fast``: the same program."""

from .errors import EXIT_INTERRUPTED


def main() -> int:
    """Run the command line; also while it is still being loaded, Ctrl-C ends it without a traceback."""
    try:
        from .cli import main
        from .malloc import disable_malloc_trim

        disable_malloc_trim()
        return main()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
