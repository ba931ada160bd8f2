"""Memory that large results of ops leave for later ones, and the call that keeps more of it."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from stacked import EXTENSION, needs_extension
from torch import Tensor

import asvit_fast as af
from asvit_fast._extension import memory_of_torch
from asvit_fast.memory import release

pytestmark = needs_extension
MEBIBYTE = 2**20


def large(rows: int = 8192) -> Tensor:
    """A result of 4 KiB a row."""
    packed = torch.ops.asvit_fast_C.linear_pack(torch.ones(1024, 1))
    return torch.ops.asvit_fast_C.linear(torch.ones(rows, 1), packed, 1024, None, None, "none")


@pytest.fixture(autouse=True)
def limit() -> Iterator[int]:
    """Nothing is kept at first; the limit is put back."""
    assert EXTENSION is not None
    before = EXTENSION.memory_limit()
    EXTENSION.set_memory_limit(0)
    EXTENSION.set_memory_limit(256 * MEBIBYTE)
    yield before
    EXTENSION.set_memory_limit(before)


def test_memory_is_used_again() -> None:
    """Of sizes that differ a little, too; small tensors are torch's own."""
    assert EXTENSION is not None and EXTENSION.memory_kept() == 0
    address = large().data_ptr()
    assert EXTENSION.memory_kept() >= 32 * MEBIBYTE
    other = large(8000)
    assert other.data_ptr() == address and EXTENSION.memory_kept() == 0
    small = large(128)
    del small, other
    assert 32 * MEBIBYTE <= EXTENSION.memory_kept() < 40 * MEBIBYTE


def test_views_keep_their_memory() -> None:
    assert EXTENSION is not None
    view = large()[5:7]
    assert EXTENSION.memory_kept() == 0 and torch.equal(large(), torch.ones(8192, 1024)) and bool((view == 1).all())
    storage = weakref.ref(view.untyped_storage())
    del view
    assert EXTENSION.memory_kept() > 0 and storage() is None


def test_limit() -> None:
    """What is above is given back at once."""
    assert EXTENSION is not None
    tensors = [large() for _ in range(12)]
    del tensors
    assert 200 * MEBIBYTE < EXTENSION.memory_kept() <= 256 * MEBIBYTE
    EXTENSION.set_memory_limit(0)
    assert EXTENSION.memory_kept() == 0
    large()
    assert EXTENSION.memory_kept() == 0


def test_it_is_a_tensor_like_any_other() -> None:
    """It can be shared, saved by autograd, made in inference mode and made smaller; to grow, memory is torch's."""
    assert EXTENSION is not None
    x = large()
    assert x.resize_(1000, 1024).shape == (1000, 1024) and bool((x.resize_(8192, 1024) == 1).all())
    with pytest.raises(RuntimeError, match="not resizable"):
        x.resize_(9000, 1024)
    EXTENSION.set_memory_limit(0)
    assert large().resize_(9000, 1024).shape == (9000, 1024)
    EXTENSION.set_memory_limit(256 * MEBIBYTE)
    assert bool((large().share_memory_() == 1).all())
    with torch.inference_mode():
        assert large().is_inference()
    assert not large().is_inference() and large()._version == 0
    weight = torch.nn.Parameter(torch.randn(1024, 64))
    rows = torch.randn(8192, 64, requires_grad=True)
    af.ops.linear(rows, weight).square().sum().backward()
    assert rows.grad is not None and weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, about threads
def test_a_forked_process_has_its_own() -> None:
    first = large()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        ok = bool((large() == 1).all()) and bool((first == 1).all())
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0 and bool((first == 1).all())


@pytest.mark.parametrize("early", [True, False])
def test_tune_allocator(early: bool) -> None:
    """A fourth of the memory, whether it is called before or after the extension is loaded; a setting stays."""
    load = "from asvit_fast._extension import extension; extension()"
    call = "assert af.tune_allocator()"
    program = "\n".join([
        "import asvit_fast as af", *((call, load) if early else (load, call)), "print(extension().memory_limit())",
    ])  # fmt: skip

    def run(**settings: str) -> int:
        environment = {**os.environ, **settings}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    memory = run(ASVIT_FAST_MEMORY_SHARE="1")  # of the machine, or of a container in it
    assert 0 < memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert run() == memory // 4
    assert run(ASVIT_FAST_MEMORY_SHARE="8") == memory // 8


def test_much_smaller_tensors_take_other_memory() -> None:
    assert EXTENSION is not None
    first, second = large(), large(1024)
    del first
    kept = EXTENSION.memory_kept()
    third = large(1024)
    assert EXTENSION.memory_kept() == kept and third.data_ptr() != second.data_ptr()
    del second, third


def test_what_is_kept_can_be_freed() -> None:
    assert EXTENSION is not None
    large()
    kept = EXTENSION.memory_kept()
    assert kept > 0
    release()
    assert EXTENSION.memory_kept() == 0 and EXTENSION.memory_limit() == 256 * MEBIBYTE
    large()
    assert EXTENSION.free_kept_memory() == kept and EXTENSION.free_kept_memory() == 0


def test_what_is_kept_is_freed_when_memory_runs_out() -> None:
    program = "\n".join([
        "import resource, torch",
        "from asvit_fast._extension import extension",
        "module = extension()",
        "module.set_memory_limit(1 << 30)",
        "packed = torch.ops.asvit_fast_C.linear_pack(torch.ones(1024, 1))",
        "result = lambda rows: torch.ops.asvit_fast_C.linear(torch.ones(rows, 1), packed, 1024, None, None, 'none')",
        "several = [result(1 << 15) for _ in range(6)]",  # 128 MiB each
        "del several",
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()",
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))",
        "assert module.memory_kept() >= 6 << 27",
        "assert result(1 << 16).numel() == 1 << 26 and module.memory_kept() > 0",
    ])  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_blocks_without_our_memory_overlap() -> None:
    assert EXTENSION is not None
    before = EXTENSION.memory_limit()
    first, second = memory_of_torch(), memory_of_torch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert EXTENSION.memory_limit() == 0
    second.__exit__(None, None, None)
    assert EXTENSION.memory_limit() == before
