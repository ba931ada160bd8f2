"""Every code block of the documentation and of README: Python runs, commands exist with the options that they have.

With `-m slow` the commands of the guides run as well, in their order, and the documentation is built.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from asvit_fast.acceleration import FAMILIES, unregister
from asvit_fast.cli import main
from asvit_fast.cli.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DATA = ROOT / "docs" / "guides" / "index.md"  # makes the data set that the guides use
OPTIONAL = ("detectron2", "mmdet", "mmengine")  # no extra installs them: blocks that import them run where they are
GUIDES = [ROOT / "docs" / "guides" / f"{name}.md" for name in ("design", "train", "score", "accelerate", "export")]


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The lines of shell of a page, in words."""
    code = "\n".join(blocks(page, "bash", "console")).replace("\\\n", " ")
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def imports(code: str) -> set[str]:
    """The packages that a block imports."""
    nodes = list(ast.walk(ast.parse(code)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules = plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.partition(".")[0] for module in modules}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --------------------------------------------------------------------------- Python


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page.stem == "accelerate" else [])
        for page in PAGES
        if blocks(page, "python", "py")
    ],
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as somebody types them."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    before = list(FAMILIES)
    absent = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}
    for code in blocks(page, "python", "py"):
        if imports(code) & absent:
            continue
        exec(compile(code, name_of(page), "exec"), names)
    for family in FAMILIES:
        if family not in before and family.replacement is not None:
            unregister(family.replacement)


# --------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_exist(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs, subcommands and their options, extras, targets of make, scripts."""
    for words in commands(page):
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        check(words)
        assert not capsys.readouterr().err


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "torchrun":
        at = rest.index("-m")
        return check(["python", *rest[at:]])
    if program == "asvit-fast" or (program == "python" and rest[:2] == ["-m", "asvit_fast"]):
        arguments = rest if program == "asvit-fast" else rest[2:]
        assert arguments == ["--version"] or main([*arguments, "--print-config"]) == 0, words
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None, words
    elif program in ("python", "bash"):
        assert (ROOT / rest[0]).is_file(), words
    elif program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest[:1])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        found = [name for word in rest for group in re.findall(r"^\.\[(.*)\]$", word) for name in group.split(",")]
        assert set(found) <= set(extras), words
    else:
        assert program in ("git", "cd", "apt-get"), words


@pytest.mark.slow
def test_guides_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands of the guides but those of several GPUs and of the Hub, with fewer steps, epochs and rounds."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    for code in blocks(DATA, "python"):
        exec(code, {})
    shorter = {
        "search": ["--steps", "4"],
        "train": ["--epochs", "5", "--num-classes", "10"],
        "score": ["--repeats", "1"],
    }
    shorter |= {"scale": ["--max-steps", "1"], "bench": ["--rounds", "2", "--modes", "inference", "--batch-sizes", "1"]}
    (tmp_path / "my_code.py").write_text(
        "import timm\n\ndef make_model():\n    return timm.create_model('vit_tiny_patch16_224')\n"
    )
    without = () if importlib.util.find_spec("transformers") else ("hf:",)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seen = set()
    for words in (words for page in GUIDES for words in commands(page)):
        if words[0] != "asvit-fast" or "--push-to-hub" in words or "imagenet/" in words:
            continue
        seen.add(words[1])
        words = [word for word in words if not word.startswith(without)]
        command = [sys.executable, "-m", "asvit_fast", *words[1:], *shorter.get(words[1], [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
    assert seen >= {"search", "scale", "train", "eval", "report", "export", "score", "bench"}


# --------------------------------------------------------------------------- pages


def test_every_command_and_every_figure_has_its_place(tmp_path: Path) -> None:
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown((ROOT / "docs" / "reference" / "cli.md").read_text())
    for command in COMMANDS.values():
        assert f"## {command.name}\n" in page
        for option in command.options:
            assert f"| `{option.label}" in page, option.label
    used = "".join(page.read_text() for page in PAGES)
    images = sorted(path.name for path in (ROOT / "docs" / "images").iterdir())
    assert [name for name in images if f"images/{name}" not in used] == []
    assert all(path.stat().st_size > 1000 for path in (ROOT / "docs" / "images").iterdir())


def test_public_names_are_in_the_reference() -> None:
    import asvit_fast as af

    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: asvit_fast\.[\w.]*?(\w+)$", text, re.MULTILINE))
    modules = {"models", "nn", "ops", "scoring", "taylor", "training", "__version__"}
    assert set(af.__all__) - modules <= named
    assert set(af.ops.__all__) <= named


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_into_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert links and [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


class Sources(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("script", "img", "iframe") or (tag == "link" and given.get("rel") in ("stylesheet", "preconnect")):
            self.found.append(given.get("src") or given.get("href") or "")


@pytest.mark.slow
def test_built_pages_need_no_network(tmp_path: Path) -> None:
    """Strictly: every link, anchor and name that is not there is an error."""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        sources = Sources()
        sources.feed(text)
        assert [source for source in sources.found if "://" in source] == [], page
        assert "\\(" not in text and "<!-- generated" not in text, page  # formulas and tables are drawn


def test_code_blocks_say_their_language() -> None:
    for page in PAGES:
        assert "" not in [language for language, _ in BLOCK.findall(page.read_text())], name_of(page)
        for code in blocks(page, "python", "py"):
            ast.parse(code)
