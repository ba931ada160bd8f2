"""The one exception that says: what you gave cannot be used."""


class InputError(ValueError):
    """An argument, file or option cannot be used.

    The message is one line: what was wrong, with which value, and what to do. The command line prints it and exits with
    2.
    """


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and without torch's advice to load a file unsafely."""
    text = " ".join(str(error).split())
    if "weights_only" in text:
        return "it holds more than tensors, numbers and text"
    return text if len(text) <= 300 else text[:300] + " ..."
