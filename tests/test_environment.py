"""Backends and the environment report: what is available, and the reasons when something is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch

from asvit_fast import _extension, backends
from asvit_fast.backends import FallbackWarning, arch_runs_on, available, resolve_device, use_backend
from asvit_fast.environment import environment, format_environment, show_config
from asvit_fast.errors import InputError
from asvit_fast.ops.gelu_taylor import gelu_taylor, gelu_taylor_reference


@pytest.fixture
def op(monkeypatch):
    """An op with a CPU and a reference implementation, each returning its name."""
    monkeypatch.setattr(backends, "_implementations", dict(backends._implementations))
    monkeypatch.setattr(backends, "_notified", set())
    backends.declare("example", {"triton": lambda: "triton", "cpu": lambda: "cpu", "reference": lambda: "reference"})
    yield "example"
    backends._reason.cache_clear()


@pytest.fixture
def no_extension(monkeypatch):
    """As if nothing had been compiled."""
    monkeypatch.setattr(_extension, "_load", lambda: (None, "built without compiled kernels: no C++ compiler"))
    backends._reason.cache_clear()
    yield
    backends._reason.cache_clear()


CPU = torch.device("cpu")


def test_best_backend_is_selected(op):
    expected = "cpu" if _extension.extension() else "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if expected == "reference" else "error")
        assert backends.select(op, CPU)() == expected


def test_forced_backend(op):
    with use_backend("reference"):
        assert backends.select(op, CPU)() == "reference"
        with (
            pytest.raises(
                InputError, match="backend 'triton' cannot run example on cpu: runs on cuda tensors, not on cpu"
            ),
            use_backend("triton"),
        ):
            backends.select(op, CPU)
        assert backends.forced_backend() == "reference"
    assert backends.forced_backend() is None


def test_forced_backend_without_implementation(op):
    with use_backend("cuda"), pytest.raises(InputError, match="example has no cuda implementation"):
        backends.select(op, CPU)


def test_unknown_names(op):
    with (
        pytest.raises(InputError, match="unknown backend 'gpu': use one of reference, triton, cuda, cpu"),
        use_backend("gpu"),
    ):
        pass
    with pytest.raises(InputError, match="unknown op 'nothing'"):
        available("nothing", "cpu", "cpu")
    with pytest.raises(InputError, match="unknown backend 'gpu'"):
        available(op, "gpu", "cpu")
    with pytest.raises(InputError, match="reference is required"):
        backends.declare("other", {"cpu": lambda: None})


def test_fallback_is_said_once(op, no_extension):
    with pytest.warns(FallbackWarning, match=r"runs the reference implementation of example on cpu: .* C\+\+ compiler"):
        assert backends.select(op, CPU)() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(op, CPU)() == "reference"


def test_fallback_is_an_error_when_strict(op, no_extension, monkeypatch):
    monkeypatch.setenv("ASVIT_FAST_STRICT", "1")
    for _ in range(2):
        with pytest.raises(FallbackWarning, match="no C\\+\\+ compiler"):
            backends.select(op, CPU)


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
def test_op_works_without_extension(no_extension, monkeypatch):
    monkeypatch.setattr(backends, "_notified", set())
    x = torch.randn(3, 20)
    assert torch.equal(gelu_taylor(x), gelu_taylor_reference(x))
    with (
        use_backend("cpu"),
        pytest.raises(InputError, match="cannot run gelu_taylor on cpu: built without compiled kernels"),
    ):
        gelu_taylor(x)


def test_forced_backend_reaches_compiled_functions():
    x = torch.randn(3, 1000)
    compiled = torch.compile(lambda z: gelu_taylor(z) + 0, backend="aot_eager", fullgraph=True)
    compiled(x)
    with use_backend("reference"):
        assert torch.equal(compiled(x), gelu_taylor_reference(x))


def test_use_backend_inside_a_compiled_function():
    def inside(x):
        with use_backend("reference"):
            return gelu_taylor(x)

    x = torch.randn(3, 1000)
    assert torch.equal(torch.compile(inside, backend="aot_eager")(x), gelu_taylor_reference(x))


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.0", (9, 0), False),
        ("9.0", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("10.0+PTX", (12, 0), True),
        ("10.0+PTX", (9, 0), False),
        ("10.0", (10, 3), True),
    ],
)
def test_arch_runs_on(arch, capability, runs):
    assert arch_runs_on(arch, capability) is runs


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [
        ("3.6.0", (9, 0), None),
        ("3.6.0", (10, 0), "Triton 3.6.0 fails to compile"),
        ("3.7.1", (12, 0), "update torch to get 3.8"),
        ("3.8.0", (10, 0), None),
        ("3.10.0", (10, 0), None),
        ("3.8.0", (7, 5), "capability 8.0 or later, this one is 7.5"),
    ],
)
def test_triton_on_old_and_new_gpus(monkeypatch, version, capability, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(backends.metadata, "version", lambda name: version)
    why = backends._triton_reason(0)
    assert why is None if words is None else words in why


def test_resolve_device():
    assert resolve_device("cpu") == CPU
    assert resolve_device(torch.device("meta")).type == "meta"
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device 'gpu' is not known: use cpu, cuda or cuda:N"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="device 'cuda:99' does not exist: torch sees"):
        resolve_device("cuda:99")


def test_environment_is_json_and_names_every_op():
    state = json.loads(json.dumps(environment()))
    assert state["versions"]["torch"] == torch.__version__
    assert set(state["ops"]) == set(backends.declared()) >= {"gelu_taylor"}
    for devices in state["ops"].values():
        assert set(devices["cpu"]) == set(backends.BACKENDS)
        assert devices["cpu"]["reference"] is None


def test_env_answers_before_torch_is_there():
    """Versions, processor and build report come at once; the rest when torch has been imported."""
    command = [sys.executable, "-X", "importtime", "-m", "asvit_fast", "env"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        if line.startswith("Build of the extension"):
            first = time.perf_counter() - started
            assert not any(part.rpartition("|")[2].strip() == "torch" for part in lines)
        lines.append(line)
    assert process.wait() == 0 and first < 3  # 0.2 s, with room for a machine that is busy
    assert any(line.startswith("gelu_taylor on cpu") for line in lines)


def test_env_where_torch_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    (tmp_path / "torch" / "version.py").write_text("__version__, cuda = '2.99.0', None")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    done = subprocess.run([sys.executable, "-m", "asvit_fast", "env"], capture_output=True, text=True, check=False)
    assert done.stderr == "asvit-fast: torch cannot be imported: libtorch_cpu.so: cannot open\n"
    assert done.returncode == 1 and "2.99.0" in done.stdout and "Build of the extension" in done.stdout


def test_show_config(capsys):
    show_config()
    text = capsys.readouterr().out
    assert text.strip() == format_environment(environment())
    assert torch.__version__ in text
    assert "gelu_taylor on cpu" in text
    assert "triton     no: " in text


@pytest.mark.skipif(_extension.extension() is None, reason=str(_extension.reason()))
def test_instruction_set_from_the_environment(monkeypatch):
    program = "from asvit_fast._extension import extension; print(extension().get_isa())"
    monkeypatch.setenv("ASVIT_FAST_ISA", "portable")
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "portable"
    monkeypatch.setenv("ASVIT_FAST_ISA", "avx1024")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "instruction set 'avx1024' cannot run here: use one of" in failed.stderr


@pytest.mark.skipif(_extension.extension() is None, reason=str(_extension.reason()))
def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"'sse9' cannot run here: use one of .*portable"):
        _extension.extension().set_isa("sse9")


def test_environment_variables_that_matter_are_told(monkeypatch, capsys):
    """And no others: what is printed goes into bug reports."""
    monkeypatch.setenv("ASVIT_FAST_STRICT", "0")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    show_config()
    printed = capsys.readouterr().out
    assert "ASVIT_FAST_STRICT" in printed and "a secret" not in printed and "system" in printed
