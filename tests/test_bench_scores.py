"""The benchmark of whole networks: it runs, checks before it times, and its JAX network is ours."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import asvit_fast as af
from asvit_fast.topology import Topology

SMALL = ["--img-size", "32", "--rounds", "2", "--steps", "2", "--repeats", "2", "--batch", "3", "--device", "cpu"]
TORCH_PEERS = {
    "order 1": "torch.func.jvp, eager",
    "order 2": "nested torch.func.jvp, eager",
    "NTK": "vmap(grad), eager",
}


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/ as its neighbours do."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "bench_scores.py"), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


@pytest.mark.slow
def test_every_part_has_rows(root: Path, tmp_path: Path) -> None:
    parts = ["forward", "order1", "order2", "ntk", "topology", "search", "authors"]
    table = tmp_path / "scores.csv"
    done = run(root, "--only", *parts, "--without", "compiled", "jax", "--csv", str(table))
    assert done.returncode == 0, done.stderr
    assert "authors: left out" in done.stdout
    again = run(root, "--only", "forward", "--csv", str(table))  # rows are added
    assert again.returncode == 0, again.stderr
    rows = list(csv.DictReader(table.open()))
    assert [row["case"] for row in rows].count("forward, 10 thetas, 32 px") == 2
    assert all(float(row["error"]) < 2e-3 and float(row["milliseconds"]) > 0 for row in rows)
    assert {row["topology"] for row in rows} == {"8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,32"}
    ours = [row["case"] for row in rows if row["provider"] == "ours"]
    assert len(ours) == len(set(ours)) == 6
    for start, peer in TORCH_PEERS.items():
        providers = {row["provider"] for row in rows if row["case"].startswith(start)}
        assert {peer, "reference", "ours"} <= providers
        assert not any("compiled" in provider or "jax" in provider for provider in providers)
    step, total = (next(row for row in rows if f"search, {what}" in row["case"]) for what in ("one step", "500 steps"))
    mean = float(total["milliseconds"]) / 500
    assert mean == pytest.approx(float(step["milliseconds"]), rel=1e-3)  # the median of two steps is their mean
    assert float(total["lower_quartile"]) < float(total["milliseconds"]) < float(total["upper_quartile"])


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_wrong_numbers_are_not_timed(benchmark, factor: float) -> None:
    networks: ModuleType = benchmark("networks")
    calls = []

    def wrong() -> torch.Tensor:
        calls.append(1)
        return factor * expected

    expected = torch.arange(1.0, 5.0, dtype=torch.float64)  # [4]
    providers = networks.Providers(networks.Settings(torch.device("cpu")))
    providers.add("right", lambda: expected.float())
    providers.add("wrong", wrong)
    with pytest.raises(SystemExit, match=r"case: wrong results, no time recorded: .*'wrong'"):
        providers.rows("case", expected, 1e-3, rounds=2)
    assert len(calls) == 1


def test_a_compiler_that_fails_is_named(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    networks: ModuleType = benchmark("networks")

    def fails() -> torch.Tensor:
        raise RuntimeError("no rule for this\nmore")

    providers = networks.Providers(networks.Settings(torch.device("cpu"), without=("slow",)))
    providers.add_compiled("broken", lambda: fails)
    providers.add_compiled("slow peer", fails)
    assert providers.runs == {}
    assert capsys.readouterr().out == "broken: left out, RuntimeError: no rule for this\n"


def test_a_table_of_other_columns_is_refused(benchmark, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("benchmark,case\n")
    with pytest.raises(SystemExit, match=r"other columns \(benchmark, case\): remove it"):
        benchmark("networks").check_table(table, torch.device("cpu"))


def test_reference_must_be_a_clone(benchmark, tmp_path: Path) -> None:
    settings = benchmark("networks").Settings(torch.device("cpu"))
    with pytest.raises(SystemExit, match=r"is no clone of github.com/VITA-Group/AsViT"):
        benchmark("against_asvit").rows(tmp_path, settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "side", "norm"),
    [("8,2,3|4,1,2|4,1,4|4,1,6|32", 32, "identity"), ("7,4,3,2|3,2,2,1|2,2,4,1|4,1,6,1|16", 52, "layer")],
)
def test_jax_network_is_ours(benchmark, topology: str, side: int, norm: str) -> None:
    pytest.importorskip("jax")
    jax_asvit: ModuleType = benchmark("jax_asvit")
    networks: ModuleType = benchmark("networks")
    settings = networks.Settings(torch.device("cpu"), Topology.parse(topology), side)
    exact = settings.network(norm, torch.float64)
    x, dx = torch.randn(2, 3, 3, side, side)  # each [3, 3, side, side]
    expected = af.jet(exact.score_features, x.double(), dx.double(), -x.double())
    peer = jax_asvit.Peer(settings.network(norm), torch.device("cpu"))
    for name, orders in (("jvp", 1), ("nested jvp", 2), ("jet", 2)):
        assert networks.error(peer.compile(name, x, dx)(), expected[: orders + 1]) < 1e-5
    assert networks.error(peer.compile("vmap(grad)", x)(), af.ntk_gram(exact, x.double())) < 1e-5
