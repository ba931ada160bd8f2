"""notebooks/*.ipynb out of the scripts beside this file: `python examples/make_notebooks.py`."""

from __future__ import annotations

from pathlib import Path

import jupytext

HERE = Path(__file__).parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def scripts() -> list[Path]:
    """All but this one."""
    return sorted(path for path in HERE.glob("*.py") if path != Path(__file__))


def notebook(script: Path) -> str:
    """The notebook of a script, the same text each time."""
    content = jupytext.read(script, fmt="py:percent")
    content.metadata = KERNEL
    for number, cell in enumerate(content.cells):
        cell["id"] = f"cell-{number}"
    return jupytext.writes(content, fmt="ipynb").rstrip() + "\n"


def main() -> None:
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for script in scripts():
        (folder / f"{script.stem}.ipynb").write_text(notebook(script))


if __name__ == "__main__":
    main()
