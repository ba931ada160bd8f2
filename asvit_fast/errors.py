"""The one exception that says: what you gave cannot be used."""


class InputError(ValueError):
    """An argument, file or option cannot be used.

    The message is one line: what was wrong, with which value, and what to do. The command line prints it and exits with
    2.
    """
