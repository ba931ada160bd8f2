"""`asvit-fast bench` and `af.benchmark`: every provider, checks before times, the end of memory, files, plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_swin import images, is_fast, needs_kernels, swin
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.bench import providers, rooflines
from asvit_fast.bench.networks import measure
from asvit_fast.bench.providers import Place
from asvit_fast.bench.rooflines import product_peak
from asvit_fast.bench.rows import COLUMNS, BenchRow, read_rows, table_lines, write_rows
from asvit_fast.bench.sources import Sample, open_source
from asvit_fast.bench.workloads import workload_of
from asvit_fast.cli import main
from asvit_fast.cost import count_macs
from asvit_fast.errors import InputError
from asvit_fast.report import report
from asvit_fast.settings import BenchSettings

TOPOLOGY = "4,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"
QUICK: dict[str, Any] = {"rounds": 2, "device": "cpu", "progress": False}
QUICK_OPTIONS = ["--rounds", "2", "--device", "cpu", "--img-size", "32", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def small_products() -> Iterator[None]:
    """Products and copies that take no time: what the machine can do is not the question here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooflines, "SIDES", {"cpu": (128, 256), "cuda": (256,)})
        patch.setattr(rooflines, "COPIED", {"cpu": 1 << 20, "cuda": 1 << 20})
        product_peak.cache_clear()
        yield
        product_peak.cache_clear()


@pytest.fixture(scope="module")
def rows(small_products: None) -> list[BenchRow]:
    """A small Swin with every provider of torch that needs no compiler."""
    return af.benchmark(swin(), images(3), (1, 4), against=("source", "sdpa"), **QUICK)


def by_provider(rows: list[BenchRow]) -> dict[str, BenchRow]:
    return {row.provider: row for row in rows}


# networks


def test_rows(rows: list[BenchRow]) -> None:
    cases = [(row.mode, row.batch, row.provider) for row in rows]
    assert cases == [
        (mode, batch, name)
        for mode in ("inference", "train")
        for batch in (1, 4)
        for name in ("source", "sdpa", "ours")
    ]
    for row in rows:
        assert row.status == "ok" and row.error is not None and row.error < 1e-5
        assert row.images_per_second == pytest.approx(1e3 * row.batch / row.milliseconds, rel=1e-2)
        assert row.lower_quartile <= row.milliseconds <= row.upper_quartile
        assert row.peak_mebibytes > 0 and row.rounds == 2
        assert 0 < row.share_of_peak < 1.5
        assert row.machine and row.torch == torch.__version__ and row.threads == str(torch.get_num_threads())
        assert row.image == "3x44x44" and (row.precision, row.dtype) == ("fp32", "float32")
        assert torch.__version__ in row.backend and "eager" in row.backend
    assert "fused_attn" in by_provider(rows)["sdpa"].backend


def test_rates_count_multiply_adds(rows: list[BenchRow]) -> None:
    macs = count_macs(swin(), 44)
    for row in rows:
        times = 3 if row.mode == "train" else 1
        expected = times * macs * row.batch / (row.milliseconds / 1e3) / 1e9
        assert row.gigamacs_per_second == pytest.approx(expected, rel=2e-2, abs=1e-3)
        assert row.share_of_peak == pytest.approx(
            row.gigamacs_per_second / row.peak_gigamacs_per_second, rel=0.05, abs=1e-3
        )


@needs_kernels
def test_the_given_network_stays_as_it_is() -> None:
    model = swin(drop_rate=0.5).train()
    af.accelerate(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = by_provider(af.benchmark(model, images(1), (1,), "inference", "source", **QUICK))
    assert found["source"].error < 1e-5 and "accelerate: 0" not in found["ours"].backend
    assert model.training and is_fast(model) and any(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiled(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.GELU())
    found = by_provider(
        af.benchmark(small, torch.randn(4, 3, 2, 2), (4,), against=("compiled",), compile=True, **QUICK)
    )
    assert set(found) == {"compiled", "ours", "ours-compiled"}
    assert all(row.status == "ok" for row in found.values()), found
    assert "compiled" in found["ours-compiled"].backend


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"amp": "bf16"}, {"channels_last": True}], ids=str)
def test_precision_and_layout(options: dict[str, Any]) -> None:
    found = by_provider(af.benchmark(swin(), images(2), (2,), against=("source",), **options, **QUICK))
    dtype = {"dtype": "bfloat16", "amp": "autocast bfloat16"}.get(next(iter(options)), "float32")
    for row in found.values():
        assert row.status == "ok", row
        assert row.dtype == dtype and row.channels_last is options.get("channels_last", False)


def test_batch_norms_remember_nothing_between_cases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 2))
    found = af.benchmark(model, torch.randn(8, 3, 4, 4), (2, 8), ("train", "inference"), "source", **QUICK)
    assert [row.mode for row in found[::2]] == ["inference", "inference", "train", "train"]
    assert all(row.status == "ok" and row.error < 1e-5 for row in found)


def test_samples_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.layer(x) + y, "more": self.layer(y).unsqueeze(1)}

    for sample in ((torch.randn(4, 3), torch.randn(4, 3)), {"x": torch.randn(4, 3), "y": torch.randn(4, 3)}):
        found = af.benchmark(Two(), sample, (2, 8), against=("source", "onnxruntime"), **QUICK)
        assert {row.provider for row in found} == {"source", "ours"}
        assert all(row.status == "ok" for row in found), found
    with pytest.raises(InputError, match="sample must be a tensor"):
        af.benchmark(Two(), (torch.randn(4, 3), torch.randn(2, 3)), **QUICK)


def test_batches_repeat_images() -> None:
    sample = Sample(torch.arange(8.0).reshape(8, 1))
    assert [sample.distinct(size) for size in (1, 6, 8, 13, 64)] == [1, 6, 8, 1, 8]
    assert sample.batch(6, 3, lambda x: x).value.flatten().tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ("source", "tensorrt")}, "against must be some of source, compiled, sdpa, .*got tensorrt"),
        ({"modes": ("eval",)}, "modes must be some of inference, train, got eval"),
        ({"batch_sizes": (0,)}, "batch_sizes must be an integer of 1 or more, got 0"),
        ({"batch_sizes": ()}, "batch_sizes must be one or more"),
        ({"amp": "bf16", "dtype": "bf16"}, "amp bf16 keeps the weights in fp32"),
        ({"rounds": 1}, "rounds must be an integer of 2 or more"),
        ({"device": "tpu9"}, "device 'tpu9' is not known"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        af.benchmark(nn.Linear(2, 2), torch.randn(1, 2), **{**QUICK, **options})


# what takes part, and what does not


def test_why_providers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2))
    settings = BenchSettings(against=("sdpa", "openvino", "onnxruntime"), device="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, reasons = providers.providers(source, settings, Place.of(settings))
    assert [provider.name for provider in found] == ["ours"]
    assert "no switch" in reasons["sdpa"]
    assert reasons["openvino"] == "openvino is not installed: pip install 'asvit-fast[bench]'"
    on_gpu = dataclasses.replace(Place.of(settings), device=torch.device("cuda"))
    with pytest.raises(providers.Impossible, match="peer on CPUs, and this runs on cuda"):
        providers._check_graph("onnxruntime", source, on_gpu)


def test_fused_attention_that_is_on_already() -> None:
    said: list[str] = []
    settings = BenchSettings((1,), ("inference",), ("sdpa",), rounds=2, device="cpu", img_size=32)
    source = open_source("vit_tiny_patch16_224", img_size=32)
    assert {row.provider for rows in measure(source, settings, said.append) for row in rows} == {"ours"}
    assert said == ["vit_tiny_patch16_224: sdpa left out, timm has its fused attention on in the source already"]


def test_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))
    said: list[str] = []
    settings = BenchSettings((1, 4), against=("onnxruntime",), rounds=2, device="cpu")
    source = open_source(model, torch.randn(4, 3, 8, 8))
    found = [row for rows in measure(source, settings, said.append) for row in rows if row.provider == "onnxruntime"]
    assert [(row.mode, row.batch, row.status) for row in found] == [("inference", 1, "ok"), ("inference", 4, "ok")]
    assert all("ONNX Runtime" in row.backend and row.dtype == "float32" and row.peak_mebibytes is None for row in found)
    assert any("onnxruntime is for inference, not for train" in line for line in said)


@pytest.mark.parametrize("name", ["openvino", "openvino-f32"])
def test_openvino(name: str) -> None:
    pytest.importorskip("openvino")
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))
    found = by_provider(af.benchmark(model, torch.randn(4, 3, 8, 8), (4,), "inference", (name,), **QUICK))
    assert found[name].status == "ok"
    assert found[name].backend.endswith(
        "runs in f32" if name == "openvino-f32" or found[name].dtype == "float32" else "bf16"
    )


def test_peak_of_products() -> None:
    peak = product_peak(torch.float32, torch.device("cpu"), torch.get_num_threads())
    assert peak.macs > 1e8 and peak.name.endswith(("128x128x128", "256x256x256"))


# files, the command, the report


@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_files_round_trip(rows: list[BenchRow], tmp_path: Path, name: str) -> None:
    some = [*rows, dataclasses.replace(rows[0], status="failed", note='it, "said"\nno', milliseconds=None, error=None)]
    write_rows(tmp_path / name, some)
    assert read_rows(tmp_path / name) == some
    (tmp_path / name).write_text("case,provider\n1,2\n")
    with pytest.raises(InputError, match="holds no rows of asvit-fast bench"):
        read_rows(tmp_path / name)


def test_table_names_what_has_no_time(rows: list[BenchRow]) -> None:
    header, *lines = table_lines([rows[0], dataclasses.replace(rows[1], status="out of memory", milliseconds=None)])
    assert {len(line) for line in lines} == {len(header)}
    assert lines[0][0] == "source" and lines[0][-1] == "1.00x" and lines[1][1] == "out of memory"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, listing = tmp_path / "rows.csv", tmp_path / "rows.json"
    command = ["bench", TOPOLOGY, "--batch-sizes", "1,2", "--modes", "inference", "--against", "source", *QUICK_OPTIONS]
    assert main([*command, "--csv", str(table), "--json", str(listing)]) == 0
    shown = capsys.readouterr().out
    assert "inference, batch 2, 3x32x32, fp32" in shown and "images/s" in shown
    assert read_rows(table) == read_rows(listing) and len(read_rows(table)) == 4
    assert main([*command, "--csv", str(table), "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["provider"] for row in printed] == ["source", "ours"] * 2 and list(printed[0]) == COLUMNS
    assert len(read_rows(table)) == 8  # added to those that were there


def test_what_a_network_prints_is_no_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "printing_network.py").write_text(
        "from torch import nn\n"
        "class Prints(nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        print('here')\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    return Prints(3, 4, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["bench", "printing_network:make", "--batch-sizes", "1", "--modes", "inference", "--against", "source"]
    assert main([*command, *QUICK_OPTIONS, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2 and "here" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench needs WHAT"),
        (["resnet_18"], "did you mean resnet18"),
        ([TOPOLOGY, "--against", "source,tvm"], "expected some of source, compiled, sdpa"),
        ([TOPOLOGY, "--csv", "nowhere/rows.csv"], "there is no folder 'nowhere'"),
        (["op"], "op must be followed by some of window_attention"),
        (["op", "window_attention", "--shape", "7x7"], "expected ROWSxCOLUMNSxHEAD_DIM"),
        (["op", "window_attention", "patch_embed", "--shape", "7x7x8"], "expected PATCHxCHANNELS"),
        ([TOPOLOGY, "--shape", "7x7x32"], "--shape is of single ops"),
        ([TOPOLOGY, "--batch-sizes", "1,x"], "expected a number"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("op", "shape"), [("window_attention", "4x4x8b"), ("patch_embed", "4x16"), ("patch_merge", "2x8x16x9")]
)
def test_single_ops(op: str, shape: str, tmp_path: Path) -> None:
    table = tmp_path / "ops.csv"
    sizes = ["--shape", shape, "--batch-sizes", "1"]
    command = ["bench", "op", op, *sizes, "--against", "source,sdpa", *QUICK_OPTIONS[:4]]
    assert main([*command, "--csv", str(table), "--quiet"]) == 0
    found = read_rows(table)
    expected = ["source", "sdpa", "ours"] if op == "window_attention" else ["source", "ours"]
    assert [row.provider for row in found] == 2 * expected
    for row in found:
        assert row.status == "ok" and row.error < 2e-4
        assert row.share_of_roofline > 0 and row.network == f"{op} {workload_of(op, shape)}".replace("bf16", "fp32")


def test_report(rows: list[BenchRow], tmp_path: Path) -> None:
    ended = dataclasses.replace(rows[1], batch=8, status="out of memory", note="it ended", milliseconds=None)
    write_rows(tmp_path / "rows.csv", [*rows, ended])
    page = report(tmp_path / "rows.csv")
    assert page == tmp_path / "rows.html"
    text = page.read_text()
    assert "out of memory, it ended" in text and "Providers" in text and rows[0].machine in text
    assert text.count("data:image/png;base64") == 3
    assert {path.name for path in tmp_path.glob("*.png")} == {f"rows-{n}.png" for n in ("inference", "train", "memory")}
    write_rows(tmp_path / "rows.csv", [ended])
    with pytest.raises(InputError, match="no row with a time"):
        report(tmp_path / "rows.csv")
