"""What mkdocs adds to the pages: the command line out of its declarations, formulas as MathML, files of the repository.

Nothing here needs a network, neither when the pages are built nor when they are read.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latex2mathml.converter

from asvit_fast.cli.commands import COMMANDS
from asvit_fast.cli.options import Option

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"<!-- generated: (\S+) -->")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def command_line() -> str:
    """Every command with its options, as ``--help`` has them."""
    parts = []
    for command in COMMANDS.values():
        parts += [f"## {command.name}", command.summary, "| option | default | meaning |\n|---|---|---|"]
        parts[-1] += "".join(f"\n{_row(option)}" for option in command.options)
        if command.epilog:
            examples = command.epilog.removeprefix("example: ")
            parts.append("\n".join(f"    {line.strip()}" for line in examples.splitlines()))
    return "\n\n".join(parts)


def _row(option: Option) -> str:
    name = option.label if option.flag or not option.metavar else f"{option.label} {option.metavar}"
    default = option.default
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    shown = "required" if option.required else "" if default in (None, {}, "", (), False) else f"`{text}`"
    return f"| `{name}` | {shown} | {_escaped(option.help)} |"


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def citation() -> str:
    """CITATION.cff as it is."""
    return f"```yaml\n{(ROOT / 'CITATION.cff').read_text()}```"


GENERATED: dict[str, Callable[[], str]] = {"command-line": command_line, "citation": citation}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return PLACE.sub(lambda place: GENERATED[place[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves."""

    def draw(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(draw, content)
