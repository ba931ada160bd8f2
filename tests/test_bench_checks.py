"""What `af.benchmark` checks before it times, and where it ends: wrong numbers, failures, the end of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import QUICK, by_provider, small_products
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.bench import memory, networks, providers
from asvit_fast.bench.providers import Place, Provider, Run
from asvit_fast.bench.sources import Sample

__all__ = ["small_products"]  # a fixture of all tests here


def with_provider(
    monkeypatch: pytest.MonkeyPatch, prepare: Callable[[str, Sample], Callable[[], list[Tensor]]]
) -> None:
    """A provider in the place of compiled."""

    def make(name: str, source: object, place: Place) -> Provider:
        return Provider("compiled", "a provider of the test", torch.float32, "float32", prepare)

    monkeypatch.setitem(providers._MAKERS, "compiled", make)


def test_a_wrong_provider_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)
    with_provider(monkeypatch, lambda mode, sample: lambda: [1.01 * model(sample.value).detach()])
    found = by_provider(af.benchmark(model, torch.randn(2, 3), (2,), "inference", ("source", "compiled"), **QUICK))
    wrong = found["compiled"]
    assert wrong.status == "wrong" and wrong.milliseconds is None and wrong.images_per_second is None
    assert wrong.error == pytest.approx(0.01, rel=0.01) and "allowed is 1e-03" in wrong.note
    assert found["source"].status == found["ours"].status == "ok"


class Ends(nn.Module):
    """A network with an end of its own."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.end = nn.Linear(3, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.linear(x))


@pytest.mark.parametrize("end", [torch.zeros_like, lambda y: y.masked_fill(torch.eye(3).bool()[:2], float("-inf"))])
def test_zeros_and_infinities_are_right(end: Callable[[Tensor], Tensor]) -> None:
    found = af.benchmark(Ends(end), torch.randn(2, 3), (2,), "inference", "source", **QUICK)
    assert {row.status for row in found} == {"ok"}


def test_numbers_that_differ_each_call_are_wrong() -> None:
    model = Ends(lambda y: y + 10 * torch.randn_like(y))
    found = af.benchmark(model, torch.randn(2, 3), (2,), "inference", "source", **QUICK)
    assert {row.status for row in found} == {"wrong"}


def test_outputs_without_tensors() -> None:
    model = Ends(lambda y: y.argmax(1))
    found = af.benchmark(model, torch.randn(2, 3), (2,), ("inference", "train"), "source", **QUICK)
    assert {row.status for row in found} == {"failed"}
    assert {row.note[:25] for row in found} == {"the network's output hold", "there is nothing to diffe"}


def test_batch_norm_of_vectors_is_trained() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    found = af.benchmark(model, torch.randn(4, 3), (4,), "train", "source", **QUICK)
    assert {row.status for row in found} == {"ok"}


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with_provider(monkeypatch, lambda mode, sample: lambda: [torch.full((2, 3), float("nan"))])
    found = af.benchmark(nn.Linear(3, 3), torch.randn(2, 3), (2,), "inference", "compiled", **QUICK)
    assert by_provider(found)["compiled"].status == "wrong"


class IllConditioned(nn.Module):
    """A network whose results have few digits in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + 5e4) - 5e4


def test_rounding_of_the_source_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = IllConditioned()
    with_provider(monkeypatch, lambda mode, sample: lambda: [1.1 * model(sample.value).detach()])
    found = by_provider(af.benchmark(model, torch.randn(2, 3), (2,), "inference", ("source", "compiled"), **QUICK))
    assert 1e-3 < found["source"].error < 5e-3
    assert {name: row.status for name, row in found.items()} == {"source": "ok", "ours": "ok", "compiled": "wrong"}


@pytest.mark.parametrize("when", ["checked", "timed"])
def test_the_end_of_memory_ends_the_sizes_of_a_provider(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    model, calls = nn.Linear(3, 3), {"count": 0}

    def prepare(mode: str, sample: Sample) -> Run:
        calls["count"] = 0

        def run() -> list[Tensor]:
            calls["count"] += 1
            if sample.images >= 4 and calls["count"] > (0 if when == "checked" else 3):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return [model(sample.value).detach()]

        return run

    with_provider(monkeypatch, prepare)
    found = af.benchmark(model, torch.randn(8, 3), (2, 4, 8), "inference", ("source", "compiled"), **QUICK)
    assert [(row.batch, row.status) for row in found if row.provider == "compiled"] == [(2, "ok"), (4, "out of memory")]
    assert "out of memory" in found[4].note and found[4].milliseconds is None
    assert [row.status for row in found if row.provider != "compiled"] == ["ok"] * 6  # the others go on


def test_a_failure_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(mode: str, sample: Sample) -> Run:
        raise ValueError("no such backend\nmore lines")

    with_provider(monkeypatch, prepare)
    found = af.benchmark(nn.Linear(3, 3), torch.randn(2, 3), (1, 2), "inference", "compiled", **QUICK)
    failed = [row for row in found if row.provider == "compiled"]
    assert [(row.status, row.note) for row in failed] == [("failed", "ValueError: no such backend")]


def test_memory_is_predicted_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "available_memory", lambda device: 2**20)
    model = nn.Sequential(nn.Linear(2**12, 2**12), nn.GELU())  # 16 KiB an image and layer
    found = af.benchmark(model, torch.randn(8, 2**12), (1, 1024), "inference", "source", **QUICK)
    assert [(row.batch, row.status) for row in found if row.provider == "source"] == [
        (1, "ok"),
        (1024, "out of memory"),
    ]
    assert "GiB are needed" in by_provider(found)["source"].note


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory(torch.device("cpu")) == 2000 * 1024
    for name, text in (("max", "1000000"), ("current", "900000"), ("stat", "anon 1\ninactive_file 5000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_memory(torch.device("cpu")) == 105000
    assert memory.available_memory(torch.device("cuda")) is None
