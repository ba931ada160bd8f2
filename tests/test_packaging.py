"""What is distributed: the source distribution is the repository, and the built wheel installs and runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

GENERATED = {"PKG-INFO", "setup.cfg"}  # by setuptools
OP_TESTS = ("test_linear.py", "test_patch_merge.py")


def tracked(root: Path) -> set[str]:
    """Files of the repository."""
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("no checkout of git")
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (root / name).exists()}


def test_source_distribution_is_the_repository(root: Path, tmp_path: Path) -> None:
    """Built from a copy, as setuptools writes beside the sources."""
    files = tracked(root)
    for name in files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, tmp_path / "copy" / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path / "dist")]
    environment = {**os.environ, "ASVIT_FAST_BUILD": "none"}
    subprocess.run(command, cwd=tmp_path / "copy", env=environment, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as content:
        names = {member.name.partition("/")[2] for member in content.getmembers() if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} - GENERATED == files


def test_extras_name_each_other_rightly(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["license"] == "Apache-2.0" and (root / project["license-files"][0]).is_file()
    for needs in extras.values():
        for need in needs:
            if need.startswith("asvit-fast["):
                assert set(need[len("asvit-fast[") : -1].split(",")) <= set(extras)


def test_citation_has_the_version(root: Path) -> None:
    import yaml

    import asvit_fast

    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == asvit_fast.__version__ and citation["cff-version"] == "1.2.0"
    assert citation["preferred-citation"]["title"] in (root / "docs" / "citation.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="auditwheel is not installed")
def test_wheel_installs_and_runs(root: Path, tmp_path: Path) -> None:
    """`make wheel`, then tests of ops with nothing of the checkout but these tests."""
    environment = {**os.environ, "ASVIT_FAST_BUILD": "cpu"}
    environment.pop("PYTHONPATH", None)
    variables = [f"BIN={Path(sys.executable).parent}", f"DIST={tmp_path / 'dist'}"]
    subprocess.run(["make", "--old-file=install", "wheel", *variables], cwd=root, env=environment, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    assert {"asvit_fast/py.typed", "asvit_fast/__init__.pyi", "asvit_fast/_build.json"} <= set(names)
    assert any(name.startswith("asvit_fast/_C.") for name in names)
    assert not [name for name in names if "libtorch" in name or "libc10" in name]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True)
    shutil.copytree(root / "tests", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\naddopts = -m 'not slow'\n")
    environment |= {"PYTHONPATH": f"{tmp_path / 'site'}", "ASVIT_FAST_STRICT": "1"}
    where = "import asvit_fast, asvit_fast._extension as e; print(asvit_fast.__file__, e.reason())"
    told = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.stdout.split() == [str(tmp_path / "site" / "asvit_fast" / "__init__.py"), "None"], told.stderr
    tests = [str(tmp_path / "tests" / name) for name in OP_TESTS]
    run = [
        sys.executable,
        "-c",
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run([*run, *tests], cwd=tmp_path, env=environment, check=True)
