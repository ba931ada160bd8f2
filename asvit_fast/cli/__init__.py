"""The command line: ``asvit-fast env|score|search|scale|train|eval|report|export|tune``.

Parsing needs no torch, so ``--help`` and mistakes in options answer at once; each command imports what it needs when it
runs. Mistakes of the user end with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import InputError
from . import env, eval, export, report, scale, score, search, train, tune
from .options import Command, Option, require, settings, to_yaml

PROGRAM = "asvit-fast"
COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND for module in (env, score, search, scale, train, eval, report, export, tune)
}
EXIT_INPUT = 2  # a mistake in what was given, or a file that cannot be read or written
EXIT_INTERRUPTED = 130  # the shell's convention for Ctrl-C


class _Parser(argparse.ArgumentParser):
    """Reports mistakes like everything else here: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (``env --require`` not met), 2 (bad input), 130 (interrupted)."""
    command: Command | None = None
    try:
        arguments = vars(_parser().parse_args(argv))
        command = COMMANDS[arguments.pop("command")]
        return _run(command, arguments)
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output (head, less) has left: nobody to tell
        _abandon_stdout()
        return EXIT_INPUT
    except OSError as error:
        _abandon_stdout()
        return _fail(_describe(error))
    except KeyboardInterrupt:
        resume = "; the same command continues where it stopped" if command is not None and command.resumable else ""
        print(f"\n{PROGRAM}: interrupted{resume}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(command: Command, arguments: dict) -> int:
    print_config = arguments.pop("print_config")
    values = settings(command, arguments, arguments.pop("config"))
    code = 0
    if print_config:
        sys.stdout.write(to_yaml(command, values))
    else:
        require(command, values)
        code = command.run(values)
    sys.stdout.flush()  # a full disk or a closed pipe behind stdout shows here, while it can still be reported
    return code


def _abandon_stdout() -> None:
    """What cannot be written stays in the buffer; writing it at exit would fail once more, with an exit code of its
    own."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stdout without a descriptor has no such end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_INPUT


def _describe(error: OSError) -> str:
    """What the system said and about which file, without the errno."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {str(error.filename)!r}" if error.filename is not None else reason


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Design, scale and score vision transformers without training (As-ViT, arXiv 2202.11921).",
        allow_abbrev=False,
    )
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
    if option.positional:
        parser.add_argument(option.name, nargs="?", default=argparse.SUPPRESS, metavar=option.label, help=option.help)
    elif option.flag:
        parser.add_argument(option.label, action="store_true", default=argparse.SUPPRESS, help=option.help)
    else:
        parser.add_argument(
            option.label,
            default=argparse.SUPPRESS,
            metavar=option.metavar,
            action="append" if option.repeated else "store",
            nargs="+" if option.several else None,
            help=f"{option.help} {_default(option)}",
        )


def _default(option: Option) -> str:
    if option.required:
        return "(required)"
    if option.default in (None, {}, ""):
        return "(default: none)"
    if isinstance(option.default, tuple):
        return f"(default: {','.join(map(str, option.default))})"
    return f"(default: {option.default})"
