"""The one exception that says: what you gave cannot be used; and what programs end with."""

import re


class InputError(ValueError):
    """An argument, file or option cannot be used.

    The message is one line: what was wrong, with which value, and what to do. The command line prints it and exits with
    2.

    Examples:
        >>> import asvit_fast as af
        >>> try:
        ...     af.Topology.parse("8,2,3")
        ... except af.InputError as error:
        ...     print(type(error).__name__)
        InputError
    """


EXIT_INPUT = 2  # a mistake in what was given, or a file that cannot be read or written
EXIT_INTERRUPTED = 130  # the shell's convention for Ctrl-C
EXIT_TERMINATED = 143  # and for SIGTERM
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # for terminals: torch writes them into messages


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class."""
    return next(iter(_COLOURS.sub("", str(error)).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks and without torch's advice to load a file unsafely."""
    text = " ".join(str(error).split())
    if "weights_only" in text:
        return "it holds more than tensors, numbers and text"
    return text if len(text) <= 300 else text[:300] + " ..."
