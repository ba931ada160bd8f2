"""The command line: ``asvit-fast env|bench|score|search|scale|train|eval|detect|report|export|tune``.

Parsing needs no torch, so ``--help`` and mistakes in options answer at once; each command imports what it needs when it
runs. Mistakes of the user end with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from .._version import __version__
from ..errors import EXIT_INPUT, EXIT_INTERRUPTED, InputError, first_line
from .commands import COMMANDS
from .options import Command, Option, require, settings, to_yaml

PROGRAM = "asvit-fast"
DETECT = "detect"  # whose commands have two words
SECOND_WORDS = [name.removeprefix(f"{DETECT} ") for name in COMMANDS if name.startswith(f"{DETECT} ")]


class _Parser(argparse.ArgumentParser):
    """Reports mistakes like everything else here: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        hint = _did_you_mean(wrong[1], COMMANDS) if wrong else ""
        raise InputError(f"{message}{hint}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (``env --require`` not met, ``bench`` without a time), 2 (bad
    input), 130 (interrupted)."""
    command: Command | None = None
    if sys.stdout is None:  # closed by whoever called
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without such a letter must not lose the work
    try:
        arguments = _parse(argv)
        command = COMMANDS[arguments.pop("command")]
        return _run(command, arguments)
    except InputError as error:
        return _fail(str(error) if command is None else _in_options(str(error), command))
    except BrokenPipeError:  # the reader of our output (head, less) has left: nobody to tell
        _abandon_stdout()
        return EXIT_INPUT
    except OSError as error:
        _abandon_stdout()
        reason = error.strerror or str(error) or type(error).__name__  # and the file, without the errno
        return _fail(reason if error.filename is None else f"{reason}: {str(error.filename)!r}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        return _fail(f"memory has run out ({first_line(error)}): give smaller batches, images or networks")
    except KeyboardInterrupt:
        resume = "; the same command continues where it stopped" if command is not None and command.resumable else ""
        print(f"\n{PROGRAM}: interrupted{resume}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    parsed, unknown = _parser().parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    if unknown:
        command = COMMANDS[parsed.command]
        hint = _did_you_mean(unknown[0], [option.label for option in command.options if not option.positional])
        raise InputError(f"{command.name} does not know {' '.join(unknown)}{hint}; see {PROGRAM} {command.name} --help")
    return vars(parsed)


def _joined(argv: Sequence[str]) -> list[str]:
    """Commands of two words as one argument; ``detect WHAT`` is ``detect train WHAT``."""
    first, *rest = argv or [""]
    if first != DETECT:
        return list(argv)
    if rest and f"{DETECT} {rest[0]}" in COMMANDS:
        return [f"{DETECT} {rest[0]}", *rest[1:]]
    meant = difflib.get_close_matches(rest[0], SECOND_WORDS, 1, 0.7) if rest else []
    if meant:
        raise InputError(f"{DETECT} does not know {rest[0]} (did you mean {meant[0]}?); see {PROGRAM} {DETECT} --help")
    return [f"{DETECT} train", *rest]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.partition("=")[0], list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _run(command: Command, arguments: dict) -> int:
    print_config = arguments.pop("print_config")
    values = settings(command, arguments, arguments.pop("config"))
    code = 0
    if print_config:
        sys.stdout.write(to_yaml(command, values))
    else:
        require(command, values)
        run = _load(command)
        with _plain_warnings():
            code = run(values)
    sys.stdout.flush()  # a full disk or a closed pipe behind stdout shows here, while it can still be reported
    return code


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings take one line, without the line of code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{PROGRAM}: warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _load(command: Command) -> Callable[[SimpleNamespace], int]:
    """The function that does the work of a command, after the imports that take seconds.

    Torch, numpy and others turn Ctrl-C into errors of their own while they are imported: until they are there it ends
    the process at once, as nothing has begun.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    replaceable = in_main_thread and on_interrupt is signal.default_int_handler  # else somebody else decides
    if replaceable:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        module = importlib.import_module(f"{__package__}.{command.name.replace(' ', '_')}")
    finally:
        if replaceable:
            signal.signal(signal.SIGINT, on_interrupt)
    return module.run


def _end_at_once(*_: object) -> None:
    sys.stderr.write(f"\n{PROGRAM}: interrupted\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def _abandon_stdout() -> None:
    """Give up output that cannot be written: at exit it would fail once more, with an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stdout without a descriptor has no such end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_INPUT


def _in_options(message: str, command: Command) -> str:
    """The message with options as they are typed here: --crop-pct for crop_pct, as Python's functions call it.

    Names of a single word are left but at the beginning: they may be words of the sentence. So is what stands in a
    path, in quotes, or behind the name of a file, whose field it is.
    """
    for option in command.options:
        name, label = option.parameter or option.name, option.label
        if "_" in name:
            typed = rf"(?<![\w/.'\"-])(?<!': ){name}"
            message = re.sub(f"{typed}=", f"{label} ", message)
            message = re.sub(rf"{typed}(?![\w/.'\"-])", label, message)
        elif not option.positional:
            message = re.sub(rf"^{name}(?= (must|is|cannot) )", label, message)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Design, scale and score vision transformers without training (As-ViT, arXiv 2202.11921).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=command.epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option in command.options:
            _add(sub, option)
        sub.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line beats it")
        sub.add_argument(
            "--print-config", action="store_true", help="print the options in effect as YAML, do nothing else"
        )
    return parser


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    """Absent options stay absent (SUPPRESS), so that a YAML file can fill them before the defaults do."""
    help_text = option.help.replace("%", "%%")  # argparse fills in what follows a single one
    if option.positional:
        nargs = "*" if option.several else "?"
        parser.add_argument(option.name, nargs=nargs, default=argparse.SUPPRESS, metavar=option.label, help=help_text)
    elif option.flag:
        parser.add_argument(option.label, action="store_true", default=argparse.SUPPRESS, help=help_text)
    else:
        parser.add_argument(
            option.label,
            default=argparse.SUPPRESS,
            metavar=option.metavar,
            action="append" if option.repeated else "store",
            nargs="+" if option.several else None,
            help=f"{help_text} {_default(option)}",
        )


def _default(option: Option) -> str:
    if option.required:
        return "(required)"
    text = ",".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
    return f"(default: {'none' if text in (None, {}, '') else text})"
