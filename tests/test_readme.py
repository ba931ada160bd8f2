"""The figures of README and of the documentation are those of benchmarks/results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_made_from_the_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    found = ""
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.filled(text) == text, f"{page.name}: python benchmarks/readme_tables.py --write"
        found += text
    assert [name for name in tables.TABLES if f"<!-- {name} -->" not in found] == []
