"""Which implementation of an op runs, decided here and nowhere else, with the reason when one may not.

An op declares its implementations once, best first for each kind of device (``ops.fused_op``), with what each can run:

    backends.declare("patch_merge", {"triton": _triton, "cpu": _compiled, "reference": ...}, can_run={"triton": ...})

and asks `choose(op, device, operands, config)` at every call. `use_backend("reference")` forces one for everything
inside. torch.compile traces the same graph whatever is forced, as the op asks again when it runs; what has to be known
of the device while tracing is constant.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from typing import Any

import torch

from asvit_fast import _extension
from asvit_fast.errors import InputError
from asvit_fast.settings import BACKENDS

MINIMUM_CAPABILITY = (8, 0)  # Ampere

Implementation = Callable[..., Any]  # tensors
CanRun = Callable[[Sequence[Any], Any], str | None]  # (operands, config) -> why not, or None


class FallbackWarning(UserWarning):
    """Something slower than intended runs, for the reason given. With ASVIT_FAST_STRICT=1 it is an error."""


_implementations: dict[str, dict[str, Implementation]] = {}
_can_run: dict[str, Mapping[str, CanRun]] = {}
_forced: ContextVar[str | None] = ContextVar("asvit_fast_backend", default=None)
_notified: set[object] = set()
_of_torch: set[str] = set()  # ops whose implementations are all torch's


# --------------------------------------------------------------------------- declaring and choosing


def declare(
    op: str,
    implementations: Mapping[str, Implementation],
    *,
    can_run: Mapping[str, CanRun] | None = None,
    of_torch: bool = False,
) -> None:
    """Declare the implementations of `op` by backend, best first; each takes and returns the same as the reference.

    `can_run`: by backend, why it cannot run on operands with a config; None if it can. A backend that is not in it runs
    on all. `of_torch`: all are functions of torch: they need no extension, and what only the reference runs, it runs
    without a word, whatever is forced.
    """
    unknown = set(implementations) - set(BACKENDS)
    if unknown or "reference" not in implementations:
        raise InputError(
            f"{op}: backends are {', '.join(BACKENDS)} and reference is required, got {sorted(implementations)}"
        )
    _implementations[op], _can_run[op] = dict(implementations), can_run or {}
    (_of_torch.add if of_torch else _of_torch.discard)(op)


def declared() -> dict[str, tuple[str, ...]]:
    """Every op with the backends it has an implementation for."""
    return {op: tuple(implementations) for op, implementations in _implementations.items()}


def available(op: str, backend: str, device: str | torch.device | None = None) -> str | None:
    """None if `backend` can run `op` on `device` (None: the best device), otherwise the reason why it can't."""
    if op not in _implementations:
        raise InputError(f"unknown op {op!r}: use one of {', '.join(_implementations)}")
    if backend not in _implementations[op]:
        _check_name(backend)
        return f"{op} has no {backend} implementation"
    return _unavailable_reason(op, backend, resolve_device(device))


def choose(op: str, device: torch.device, operands: Sequence[Any] = (), config: Any = None) -> str:
    """The backend to run `op` on `device`: the forced one, or the best that can run on these operands.

    Raises InputError if a forced backend can't run. Warns once when something slower runs than was declared; that
    torch's own fused operation takes what no kernel of ours can is no reason to.
    """
    backend, missed = best(op, device, operands, config)
    forced = forced_backend()
    if forced is not None and not (op in _of_torch and backend == "reference"):
        why = available(op, forced, device) or _refusal(op, forced, operands, config)
        if why is not None:
            raise InputError(f"backend {forced!r} cannot run {op} on {device}: {why}")
        return forced
    is_loss = backend == "reference" and op not in _of_torch
    if missed is not None and (is_loss or best(op, device)[1] is not None):
        _warn_slower(op, backend, device.type, missed)
    return backend


def implementation(op: str, backend: str) -> Implementation:
    return _implementations[op][backend]


def select(op: str, device: torch.device) -> Implementation:
    """The implementation of `op` to run on `device`; see `choose`."""
    return _implementations[op][choose(op, device)]


def best(op: str, device: torch.device, operands: Sequence[Any] = (), config: Any = None) -> tuple[str, str | None]:
    """The best backend that can run `op` on `device`, and why a better one for such devices cannot, if there is one."""
    missed: str | None = None
    for backend in _implementations[op]:
        why = _unavailable_reason(op, backend, device) or _refusal(op, backend, operands, config)
        if why is None:
            return backend, missed
        if device.type in _DEVICES[backend]:
            missed = missed or why
    raise AssertionError(f"{op}: the reference runs everywhere")


def _refusal(op: str, backend: str, operands: Sequence[Any], config: Any) -> str | None:
    """Why `backend` cannot run `op` on these operands."""
    can_run = _can_run[op].get(backend) if operands else None
    return None if can_run is None else can_run(operands, config)


@torch.compiler.assume_constant_result  # a warning would break the graph
def _warn_slower(op: str, backend: str, device_type: str, why: str) -> None:
    notify_once(why, f"asvit_fast runs the {backend} implementation of {op} on {device_type}: {why}")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend for every op inside the `with` block, forward and backward.

    Args:
        backend: "reference" (plain PyTorch operations), "cpu" (compiled C++), "triton" or "cuda".

    Raises:
        InputError: at once for an unknown name; when an op runs that the backend cannot run there, with the reason.
        RuntimeError: inside a compiled function, where it has no effect: put the call into the block instead.

    It holds for the code that the block calls, in this thread (a `contextvars.ContextVar`): other threads and
    interleaved coroutines keep their own choice. Blocks nest, and can decorate a function. Compiled models obey as
    well, as the choice is made when an op runs. What an op leaves to torch for its size, type or device (`show_config`
    lists the backends) stays torch's.

    Examples:
        >>> import torch, asvit_fast as af
        >>> qkv = torch.randn(1, 14, 14, 3 * 32)
        >>> with af.use_backend("reference"):
        ...     expected = af.ops.window_attention(qkv, 2, (7, 7))
        >>> torch.allclose(af.ops.window_attention(qkv, 2, (7, 7)), expected, atol=1e-5)
        True
    """
    _check_name(backend)
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend inside a compiled function has no effect on it: put the call into the block instead"
        )
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced by `use_backend`, if any; None while torch.compile traces, as the op asks when it runs."""
    return None if torch.compiler.is_compiling() else _forced.get()


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")


# --------------------------------------------------------------------------- reasons


@torch.compiler.assume_constant_result  # what is asked about the device would break the graph
def unavailable_on(backend: str, device_type: str, index: int | None) -> str | None:
    """Why `backend` can't run on a device, whatever the op; None if it can. Constant for the life of the process, also
    for torch.compile."""
    return _reason(backend, device_type, index)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cpu_reason(index: int | None) -> str | None:
    return _extension.reason()


def _driver_version() -> int:
    """The newest CUDA that the driver of the GPUs knows, 13000 for 13.0; 0 where the driver does not answer."""
    version = ctypes.c_int(0)
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _cuda_reason(index: int | None) -> str | None:
    why = _extension.cuda_reason()
    if why is not None:
        return why
    built, driver = _extension.build_report()["cuda"], _driver_version() // 1000
    if driver < int(built.split(".")[0]):  # the kernels' runtime is that of the build, not torch's
        return f"built with CUDA {built}, the driver of the GPU knows CUDA {driver}: update it, or rebuild"
    archs = _extension.build_report()["archs"]
    capability = torch.cuda.get_device_capability(index)
    if any(arch_runs_on(arch, capability) for arch in archs):
        return None
    gpu = ".".join(str(part) for part in capability)
    return f"compiled for {', '.join(archs)}, the GPU is {gpu}: set TORCH_CUDA_ARCH_LIST and rebuild"


def _triton_reason(index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if importlib.util.find_spec("asvit_fast.kernels") is None:
        return (
            "asvit_fast.kernels is missing: install the package (pip install -e .), a bare source tree has it elsewhere"
        )
    if _interpreted():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        return f"needs a GPU of capability 8.0 or later, this one is {capability[0]}.{capability[1]}"
    version = metadata.version("triton")
    if capability[0] >= 10 and tuple(int(part) for part in version.split(".")[:2]) < (3, 8):
        return f"Triton {version} fails to compile attention for this GPU: update torch to get 3.8 or later"
    return None


_DEVICES: dict[str, tuple[str, ...]] = {  # () is any device, and none that it was made for
    "triton": ("cuda",), "cuda": ("cuda",), "cpu": ("cpu",), "sdpa": (), "reference": (),
}  # fmt: skip
_REASONS: dict[str, Callable[[int | None], str | None]] = {
    "triton": _triton_reason,
    "cuda": _cuda_reason,
    "cpu": _cpu_reason,
}


def _unavailable_reason(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` can't run `op`, which it has an implementation of, on a device."""
    if (backend == device.type == "cpu" and op in _of_torch) or not _needs(backend):
        return None
    return unavailable_on(backend, device.type, device.index)


def _needs(backend: str) -> bool:
    """Whether it needs more than torch."""
    return backend not in ("reference", "sdpa")


@functools.cache
def _reason(backend: str, device_type: str, index: int | None) -> str | None:
    """Why `backend` can't run on a device, whatever the op; constant for the life of the process."""
    if not _needs(backend):
        return None
    runs_on = _DEVICES[backend]
    if device_type not in runs_on and not (backend == "triton" and device_type == "cpu" and _interpreted()):
        return f"runs on {' or '.join(runs_on)} tensors, not on {device_type}"
    if device_type == "cuda" and torch.version.hip is not None:
        return "not supported on ROCm"
    return _REASONS[backend](index)


def arch_runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for `arch` ("9.0", "9.0a", "10.0+PTX") runs on a GPU of that capability."""
    version, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
    exact = version[-1].isalpha()
    major, minor = (int(part) for part in version.rstrip("abcdef").split("."))
    if exact:
        return (major, minor) == capability
    return capability >= (major, minor) if ptx else (major == capability[0] and minor <= capability[1])


# --------------------------------------------------------------------------- devices and warnings


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to use: CUDA if there is one, else the CPU, for None. InputError for one that does not exist."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {device!r} is not known: use cpu, cuda or cuda:N") from None
    if resolved.type != "cuda":
        return _usable(resolved)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError(f"device {str(device)!r} does not exist: torch sees no CUDA GPU here; use cpu")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= count:
        raise InputError(
            f"device {str(device)!r} does not exist: torch sees {count} CUDA GPU(s); use cuda:0 to cuda:{count - 1}"
        )
    return torch.device("cuda", index)


def _usable(device: torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used: torch {torch.__version__} has no support for it here; "
            "use cpu, cuda or cuda:N"
        ) from error
    return device


def computing_device(device: str | torch.device | None) -> torch.device:
    """``resolve_device`` for work that needs numbers: InputError for "meta", which holds none."""
    resolved = resolve_device(device)
    if resolved.type == "meta":
        raise InputError("device 'meta' holds no numbers to compute with; use cpu, cuda or cuda:N")
    return resolved


def rank_device(device: str | torch.device | None) -> torch.device:
    """The device of this process: a GPU if there is one, unless told otherwise; GPU ``LOCAL_RANK`` under torchrun.

    Raises InputError for a device that does not exist, or holds no numbers.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is not None and torch.cuda.is_available() and (device is None or str(device) == "cuda"):
        device = f"cuda:{local_rank}"
    return computing_device(device)


def strict() -> bool:
    """Whether fallbacks are errors: ASVIT_FAST_STRICT=1."""
    return os.environ.get("ASVIT_FAST_STRICT", "0") not in ("", "0")


def notify_once(key: object, message: str) -> None:
    """Warn (FallbackWarning), in one line, the first time for each `key`; ASVIT_FAST_STRICT=1 raises it every time."""
    message = " ".join(message.split())
    if strict():
        raise FallbackWarning(message)
    if key not in _notified:
        _notified.add(key)
        warnings.warn(message, FallbackWarning, stacklevel=3)


@contextmanager
def forget_notices() -> Iterator[None]:
    """Inside the `with` block everything is said again, once."""
    said = set(_notified)
    _notified.clear()
    try:
        yield
    finally:
        _notified.update(said)
