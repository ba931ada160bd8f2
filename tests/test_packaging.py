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
OP_TESTS = ("test_linear.py", "test_patch_merge.py", "test_window_attention.py", "test_layer_norm_taylor.py")


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


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that ``make wheel`` writes; ``ASVIT_FAST_TEST_WHEEL`` names one that is there."""
    if given := os.environ.get("ASVIT_FAST_TEST_WHEEL"):
        return Path(given)
    if shutil.which("make") is None or importlib.util.find_spec("auditwheel") is None:
        pytest.skip("make or auditwheel is not installed")
    dist = tmp_path_factory.mktemp("dist")
    variables = [f"BIN={Path(sys.executable).parent}", f"DIST={dist}"]
    environment = {"ASVIT_FAST_BUILD": "cpu", **outside_of_the_checkout()}
    subprocess.run(["make", "--old-file=install", "wheel", *variables], cwd=root, env=environment, check=True)
    return next(dist.iterdir())


def outside_of_the_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_content_of_the_wheel(wheel: Path) -> None:
    """Nothing of torch is in it, and it is for any Linux of its age, any Python and any torch that are supported."""
    assert "cp311-abi3" in wheel.name and "manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    needed = {"py.typed", "__init__.pyi", "_build.json", "_C.abi3.so"}
    assert {f"asvit_fast/{name}" for name in needed} <= set(names)
    assert not [name for name in names if "libtorch" in name or "libc10" in name]


@pytest.mark.slow
@pytest.mark.parametrize("torch", ["", "torch==2.11.* torchvision==0.26.*", "torch torchvision"])
def test_wheel_installs_and_runs(wheel: Path, root: Path, tmp_path: Path, torch: str) -> None:
    """Tests of ops on the wheel, with nothing of the checkout but these tests: beside the torch that is here, and in
    fresh environments with the oldest torch and with the newest, which `make test-wheel` asks for."""
    python, environment = sys.executable, {**outside_of_the_checkout(), "ASVIT_FAST_STRICT": "1"}
    if torch:
        if "ASVIT_FAST_TEST_WHEEL" not in environment:
            pytest.skip("for make test-wheel")
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
        python = str(tmp_path / "venv" / "bin" / "python")
        for wanted in (torch.split(), [f"{wheel}[test]"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], env=environment, check=True)
    else:
        site = str(tmp_path / "site")
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, str(wheel)]
        subprocess.run(install, check=True)
        environment["PYTHONPATH"] = site
    shutil.copytree(root / "tests", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\naddopts = -m 'not slow'\n")
    where = "import asvit_fast, asvit_fast._extension as e; print(asvit_fast.__file__, e.reason())"
    told = subprocess.run([python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    file, reason = told.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and reason == "None", told.stderr
    main = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    tests = [str(tmp_path / "tests" / name) for name in OP_TESTS]
    run = [python, "-c", main, "-q", "-p", "no:cacheprovider", *tests]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True)
