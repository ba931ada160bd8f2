"""`make release-check`: what must hold before a version is published. Prints one line a check, and fails at the end."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_packaging.py", "test_readme.py", "test_structure.py::test_version_is_stated_once")
COPYLEFT = re.compile(r"\b(A?GPL)\b|GNU (Affero )?General Public", re.IGNORECASE)  # LGPL's libraries may be used


def run(*command: str | Path) -> tuple[bool, str]:
    """Whether a command succeeds, and the last line of what it says."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1] if said else ""


def version_and_changelog() -> tuple[bool, str]:
    version = metadata.version("asvit-fast")
    heading = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heading is None:
        return False, f"CHANGELOG.md has no section [{version}]"
    return bool(re.fullmatch(r"\d{4}-\d\d-\d\d", heading[1])), f"CHANGELOG.md: [{version}] - {heading[1]}"


def tag() -> tuple[bool, str]:
    name = f"v{metadata.version('asvit-fast')}"
    _, at = run("git", "tag", "--points-at", "HEAD")
    return at == name, f"HEAD has the tag {at or 'none'}, expected {name}"


def clean_tree() -> tuple[bool, str]:
    _, changed = run("git", "status", "--porcelain")
    return not changed, changed or "nothing is changed"


def distributions() -> tuple[bool, str]:
    """Built in environments of their own: what pyproject.toml requires is enough."""
    ok, said = run(sys.executable, "-m", "build", "--outdir", ROOT / "dist", ROOT)
    if not ok:
        return ok, said
    wheel = max((ROOT / "dist").glob("asvit_fast-*-none-any.whl"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as folder:
        ok, said = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
        program = f"import sys; sys.path.insert(0, {folder!r}); import asvit_fast as af; af.score; print(af.__file__)"
        return run(sys.executable, "-c", program) if ok else (ok, said)


def licences() -> tuple[bool, str]:
    """Of what the package requires; a library under the GPL would bind its users."""
    needs = [Requirement(text) for text in metadata.requires("asvit-fast") or ()]
    found = {}
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        about = metadata.metadata(need.name)
        text = about.get("License-Expression") or about.get("License") or ""
        classifiers = [line for line in about.get_all("Classifier") or () if line.startswith("License")]
        found[need.name] = text.splitlines()[0][:40] if text else "; ".join(classifiers)
    bad = [name for name, licence in found.items() if not licence or COPYLEFT.search(licence)]
    return not bad, ", ".join(f"{name}: {licence or 'unknown'}" for name, licence in found.items())


def main() -> int:
    checks = {
        "version and changelog": version_and_changelog,
        "tag": tag,
        "clean tree": clean_tree,
        "requirements": lambda: run(sys.executable, "-m", "pip", "check"),
        "licences": licences,
        "tests": lambda: run(Path(sys.executable).with_name("pytest"), "-q", *(f"tests/{test}" for test in TESTS)),
        "distributions": distributions,
    }
    failed = 0
    for name, check in checks.items():
        ok, said = check()
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {name}: {said}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
