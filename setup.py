"""Builds asvit_fast and, where the machine allows it, its compiled extension `asvit_fast._C`.

The environment variable ASVIT_FAST_BUILD decides what is compiled:

    auto   (default) CPU kernels if torch and a C++ compiler are there, CUDA kernels if a matching toolkit is too;
           whatever cannot be built is left out, and the build report says why
    cuda   CPU and CUDA kernels, or an error
    cpu    CPU kernels, or an error
    none   nothing: Triton kernels and pure-torch references only

CUDA is decided by the toolkit, never by a visible GPU. CUDA_HOME and TORCH_CUDA_ARCH_LIST are honoured. The report of
what was built, or why it was not, is installed as `asvit_fast/_build.json`. ASVIT_FAST_SANITIZE=address,undefined adds
these sanitizers of the compiler (see `make sanitize`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_SETUPTOOLS = 77  # as pyproject.toml says: wheels, and licences as SPDX expressions
MODES = ("auto", "cuda", "cpu", "none")
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
NVCC_FLAGS = ["-O3", "--threads=2"]
OLDEST_TORCH = (2, 11)  # whose stable ABI the extension keeps to: it runs with that torch and all later ones
OLDEST_PYTHON = "cp311"  # likewise Python's limited API
ISAS = {"portable": 16, "avx2": 32, "avx512": 64, "avx512bf16": 64}  # of CPU kernels, and the bytes of their vectors
SANITIZERS = os.environ.get("ASVIT_FAST_SANITIZE", "")
if SANITIZERS:  # later flags win
    CXX_FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]


class CannotBuild(Exception):
    """The reason why a part of the extension cannot be built here."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile and link."""

    root: Path
    version: str  # "13.0"


@dataclass
class Plan:
    """The parts that this build compiles, and the report that travels with the install."""

    mode: str
    extension: bool = False
    toolkit: Toolkit | None = None
    report: dict[str, Any] = field(default_factory=dict)


def build_mode(environment: dict[str, str] | os._Environ[str] = os.environ) -> str:
    """ASVIT_FAST_BUILD, checked."""
    mode = environment.get("ASVIT_FAST_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"ASVIT_FAST_BUILD={mode!r} is not known: use one of {', '.join(MODES)}")
    return mode


def check_setuptools() -> None:
    """`pip install --no-build-isolation` takes the setuptools that is there, and old ones build no wheels."""
    import setuptools

    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"setuptools {setuptools.__version__} is too old to build this package: "
            f"pip install --upgrade 'setuptools>={OLDEST_SETUPTOOLS}', then again"
        )


def output_of(*command: str | Path) -> str:
    """Standard output and error of a command, together."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


# --------------------------------------------------------------------------- what the machine offers


def find_torch() -> Any:
    """The torch of the build environment."""
    if importlib.util.find_spec("torch") is None:
        raise CannotBuild("pip built apart from your torch: install torch, then `pip install --no-build-isolation .`")
    import torch

    return torch


def find_compiler() -> tuple[str, str]:
    """The C++ compiler that torch's build will call, and the first line of its --version."""
    if sys.platform == "win32":
        raise CannotBuild("the compiled extension is not supported on Windows")
    command = os.environ.get("CXX", "c++")
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise CannotBuild(f"no C++ compiler: {program!r} is not on PATH (install g++ or set CXX)")
    return command, output_of(*shlex.split(command), "--version").partition("\n")[0]


def nvcc_root(nvcc: str) -> Path:
    """The toolkit that an `nvcc` on PATH belongs to; asks nvcc itself, as it may be a link or a wrapper script."""
    answer = re.search(r"^#\$ _HERE_=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return Path(answer.group(1)).parent if answer else Path(nvcc).resolve().parent.parent


def toolkit_candidates() -> list[Path]:
    """Where a CUDA toolkit may be, best first."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    found = [Path("/usr/local/cuda"), *([nvcc_root(nvcc)] if nvcc else [])]
    return list(dict.fromkeys(path.resolve() for path in [*named, *found]))


def check_toolkit(root: Path) -> Toolkit:
    """A toolkit at `root`, if it is complete enough to compile and link."""
    if not (root / "bin" / "nvcc").is_file():
        raise CannotBuild(f"{root} has no bin/nvcc")
    if not any(root.glob("include/cuda_runtime_api.h")):
        raise CannotBuild(f"{root} has no include/cuda_runtime_api.h")
    if not any((root / folder / "libcudart_static.a").is_file() for folder in ("lib64", "lib")):
        raise CannotBuild(f"{root} has no lib64/libcudart_static.a")
    release = re.search(r"release (\d+\.\d+)", output_of(root / "bin" / "nvcc", "--version"))
    if release is None:
        raise CannotBuild(f"{root}/bin/nvcc does not run")
    return Toolkit(root, release.group(1))


def find_toolkit(torch_cuda: str | None) -> Toolkit:
    """The CUDA toolkit to build with; its major version must be torch's."""
    if torch_cuda is None:
        raise CannotBuild("torch is a CPU-only build")
    reasons: list[str] = []
    for root in toolkit_candidates():
        try:
            toolkit = check_toolkit(root)
        except CannotBuild as reason:
            reasons.append(str(reason))
            continue
        if toolkit.version.split(".")[0] == torch_cuda.split(".")[0]:
            return toolkit
        reasons.append(f"{root} is CUDA {toolkit.version}, torch was built with CUDA {torch_cuda}")
    raise CannotBuild("no usable CUDA toolkit: " + "; ".join(reasons or ["no nvcc, and no /usr/local/cuda"]))


def arch_list(toolkit: Toolkit) -> str:
    """TORCH_CUDA_ARCH_LIST, or Ampere to Blackwell as far as nvcc goes, with PTX of the newest for later GPUs."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if chosen:
        return chosen
    offered = set(output_of(toolkit.root / "bin" / "nvcc", "--list-gpu-arch").split())
    supported = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in offered]
    if not supported:
        raise CannotBuild(f"nvcc {toolkit.version} supports none of {', '.join(DEFAULT_ARCHS)}")
    return ";".join(supported) + "+PTX"


# --------------------------------------------------------------------------- the plan


def make_plan(mode: str) -> Plan:
    """Decide what to build; in the modes that demand something, the reason why not ends the build."""
    plan = Plan(mode, report={"mode": mode, "extension": False, "cuda": None, "python": platform.python_version()})
    if mode == "none":
        plan.report["reason"] = "ASVIT_FAST_BUILD=none"
        return plan
    try:
        torch = find_torch()
        _, compiler = find_compiler()
    except CannotBuild as reason:
        if mode != "auto":
            raise SystemExit(f"ASVIT_FAST_BUILD={mode}: {reason}") from None
        plan.report["reason"] = str(reason)
        return plan
    plan.extension = True
    oldest = ".".join(map(str, OLDEST_TORCH))
    plan.report |= {"torch": torch.__version__, "oldest torch": oldest, "compiler": compiler, "cxx_flags": CXX_FLAGS}
    if mode == "cpu":
        plan.report["cuda_reason"] = "ASVIT_FAST_BUILD=cpu"
        return plan
    try:
        plan.toolkit = find_toolkit(torch.version.cuda)
        archs = arch_list(plan.toolkit)
    except CannotBuild as reason:
        if mode == "cuda":
            raise SystemExit(f"ASVIT_FAST_BUILD=cuda: {reason}") from None
        plan.toolkit = None
        plan.report["cuda_reason"] = str(reason)
        return plan
    plan.report |= {
        "cuda": plan.toolkit.version,
        "cuda_home": str(plan.toolkit.root),
        "archs": archs.replace(" ", ";").split(";"),
        "nvcc_flags": NVCC_FLAGS,
    }
    return plan


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Put the build report into the package and say it in one line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(report, indent=2) + "\n")
    built = "compiled CPU and CUDA kernels" if report["cuda"] else "compiled CPU kernels"
    says = built if report["extension"] else f"no compiled kernels: {report['reason']}"
    if report["extension"] and not report["cuda"]:
        says += f" (no CUDA kernels: {report['cuda_reason']})"
    elif report["cuda"]:
        says += f" for {', '.join(report['archs'])}"
    print(f"asvit_fast: {says}", file=sys.stderr)


def package_folder(command: Any) -> Path:
    """Where a build command puts the package: the source tree for an editable install, else the build folder."""
    in_place = getattr(command, "inplace", False) or getattr(command, "editable_mode", False)
    return ROOT / "asvit_fast" if in_place else ROOT / command.build_lib / "asvit_fast"


def remove_extension(folder: Path) -> None:
    """An extension left over from an earlier build must not outlive the report that described it."""
    for stale in folder.glob("_C.*"):
        stale.unlink()


# --------------------------------------------------------------------------- the extension


def isa_sources() -> dict[Path, str]:
    """A source in build/ for each family of CPU kernels and instruction set: csrc/cpu/compile_for_isa.h, configured."""
    sources = {}
    for interface in sorted(ROOT.glob("csrc/*.h")):
        headers = [f"cpu/{interface.stem}{part}_kernel.h" for part in ("_backward", "")]  # the first includes the other
        kernels = next((header for header in headers if (ROOT / "csrc" / header).exists()), None)
        for isa, vector_bytes in ISAS.items() if kernels else ():
            source = ROOT / "build" / "isa" / f"{interface.stem}_{isa}.cpp"
            sources[source] = (
                f"#define ASVIT_FAST_ISA {isa}\n"
                f"#define ASVIT_FAST_VECTOR_BYTES {vector_bytes}\n"
                f"#define ASVIT_FAST_BF16_DOT {int(isa == 'avx512bf16')}\n"
                f'#define ASVIT_FAST_INTERFACE "{interface.name}"\n'
                f'#define ASVIT_FAST_KERNELS "{kernels}"\n'
                '#include "cpu/compile_for_isa.h"\n'
            )
    return sources


def limited_api() -> bool:
    """Whether one build is for every Python: those without the GIL have no limited API."""
    return not sysconfig.get_config_var("Py_GIL_DISABLED")


def make_extension(plan: Plan) -> tuple[Any, type]:
    """The extension and the command that builds it (torch's, with a report and a lasting folder for its objects)."""
    scripts = sysconfig.get_path("scripts")  # ninja installed by pip is found even if the environment is not activated
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    if plan.toolkit:
        os.environ["CUDA_HOME"] = str(plan.toolkit.root)  # torch reads both when its cpp_extension is imported
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.report["archs"])
    from torch.utils import cpp_extension

    kernels = isa_sources()
    sources = [*sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]), *kernels]
    if plan.toolkit:
        cpp_extension.CUDA_HOME = str(plan.toolkit.root)
        sources += sorted(ROOT.glob("csrc/cuda/*.cu"))
    major, minor = OLDEST_TORCH
    macros = [("TORCH_TARGET_VERSION", f"{major << 56 | minor << 48:#x}"), ("TORCH_STABLE_ONLY", "1")]
    kind = cpp_extension.CUDAExtension if plan.toolkit else cpp_extension.CppExtension
    extension = kind(
        "asvit_fast._C",
        [str(source.relative_to(ROOT)) for source in sources],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(header) for header in sorted(ROOT.glob("csrc/**/*.h"))],
        define_macros=[*macros, *([("ASVIT_FAST_CUDA", "1"), ("USE_CUDA", "1")] if plan.toolkit else [])],
        # libgomp is not linked: torch's own copy serves the OpenMP calls, so both share one pool of threads
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,--exclude-libs,ALL", *([f"-fsanitize={SANITIZERS}"] if SANITIZERS else [])],
        py_limited_api=limited_api(),
    )
    # libtorch.so brings torch's other libraries, CUDA's where it has them; CUDA's runtime is ours, whatever torch's is
    extension.libraries = ["torch", "torch_cpu", *(["cudart_static", "rt", "dl", "pthread"] if plan.toolkit else [])]

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            variant = "-".join(["cuda" if plan.toolkit else "cpu", *filter(None, SANITIZERS.split(","))])
            self.build_temp = str(
                ROOT / "build" / f"{variant}-{sys.implementation.cache_tag}-torch{plan.report['torch']}"
            )

        def run(self) -> None:
            for source, text in kernels.items():
                if not source.exists() or source.read_text() != text:  # else its object is up to date
                    source.parent.mkdir(parents=True, exist_ok=True)
                    source.write_text(text)
            try:
                super().run()
            except Exception as error:
                if plan.mode != "auto":
                    raise
                self.give_up(error)
            else:
                plan.report["extension"] = True
            write_report(package_folder(self), plan.report)

        def give_up(self, error: Exception) -> None:
            """In auto mode a failed compilation leaves a working pure-Python install that says what happened."""
            print(f"asvit_fast: compiling the extension FAILED: {error}", file=sys.stderr)
            plan.report |= {
                "reason": f"compilation failed: {error} (pip install -v shows the compiler's output)",
                "failed": True,
                "cuda": None,
            }
            self.extensions, self.distribution.ext_modules = [], []
            remove_extension(package_folder(self))
            remove_extension(ROOT / self.build_lib / "asvit_fast")

    return extension, BuildExtension


class BuildPython(build_py):
    """Writes the report when no extension is built (the command that builds the extension writes it otherwise)."""

    plan: Plan

    def run(self) -> None:
        super().run()
        if not self.plan.extension:
            remove_extension(package_folder(self))
            write_report(package_folder(self), self.plan.report)


def main() -> None:
    """Run setuptools on the plan."""
    check_setuptools()
    BuildPython.plan = plan = make_plan(build_mode())
    commands: dict[str, type] = {"build_py": BuildPython}
    extensions = []
    if plan.extension:
        extension, commands["build_ext"] = make_extension(plan)
        extensions.append(extension)
    setup(
        packages=[*find_packages(include=["asvit_fast", "asvit_fast.*"]), "asvit_fast.kernels"],
        package_dir={"asvit_fast": "asvit_fast", "asvit_fast.kernels": "kernels"},
        package_data={
            "asvit_fast": ["py.typed", "*.pyi"],
            "asvit_fast.scoring": ["*.json"],
            "asvit_fast.kernels": ["tiles/*.json"],
        },
        ext_modules=extensions,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}} if extensions and limited_api() else {},
    )


if __name__ == "__main__":
    main()
