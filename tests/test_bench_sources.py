"""What `asvit-fast bench` takes: names, folders, functions, networks of transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import asvit_fast as af
from asvit_fast.bench.sources import open_source
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.export import export
from asvit_fast.models.foreign import create_foreign

TOPOLOGY = "4,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"


def test_names_and_folders(tmp_path: Path) -> None:
    folder = export(TOPOLOGY, tmp_path / "model", img_size=32, num_classes=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"kind": "search", "img_size": 64}))
    (tmp_path / "run" / "trace.jsonl").write_text(json.dumps({"topology": TOPOLOGY, "most_probable": TOPOLOGY}) + "\n")
    (tmp_path / "run" / "result.json").write_text(json.dumps({"topology": TOPOLOGY}))
    shapes = {
        what: open_source(what).sample.shape
        for what in (TOPOLOGY, str(folder), str(tmp_path / "run"), "swinv2_tiny_window8_256", "squeezenet1_1")
    }
    assert list(shapes.values()) == ["3x224x224", "3x32x32", "3x64x64", "3x256x256", "3x224x224"]
    assert open_source(folder).model.num_classes == 3
    assert torch.equal(next(open_source(TOPOLOGY).model.parameters()), next(open_source(TOPOLOGY).model.parameters()))
    assert open_source("resnet18", img_size=(32, 64)).sample.shape == "3x32x64"


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\ndef small(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
        "def number(): return 3\ndef broken(): raise KeyError('x')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(create_foreign("my_networks:small"), nn.Sequential)
    assert open_source("my_networks:small", img_size=2).sample.shape == "3x2x2"
    assert str(tmp_path) not in sys.path
    for name, message in (
        ("my_networks:number", "must return a torch.nn.Module, got int"),
        ("my_networks:nothing", "has no function nothing"),
        ("my_networks:broken", "raised KeyError"),
        ("no_such_module:small", "no_such_module cannot be imported"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(name)


def test_transformers_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs transformers, which is not installed"):
        open_source("hf:swin")


def test_other_commands_refuse_foreign_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "hf:swin"]) == 2
    assert "only asvit-fast bench takes 'hf:swin'" in capsys.readouterr().err


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
    )
    config.save_pretrained(tmp_path)
    source = open_source(f"hf:{tmp_path}")
    assert type(source.model).__name__ == "SwinForImageClassification" and source.sample.shape == "3x32x32"
    found = af.benchmark(
        f"hf:{tmp_path}", None, (1, 2), against=("source", "sdpa"), rounds=2, device="cpu", progress=False
    )
    assert {row.provider for row in found} >= {"source", "ours"}
    assert all(row.status == "ok" and row.error < 1e-5 for row in found), found
    assert open_source(f"hf:{tmp_path}", img_size=64).sample.shape == "3x64x64"
    assert open_source("hf:hiera", img_size=64).sample.shape == "3x64x64"  # whose configuration has a pair
    for name, message in (
        ("hf:swiin", "no such type of model or class"),
        ("hf:nobody/nothing", "nothing is downloaded"),
        ("hf:bert", "takes input_ids, not images"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [("1 +", "SyntaxError"), ("missing", "NameError"), ("raise SystemExit('bye')", "SystemExit: bye")],
)
def test_modules_that_cannot_be_imported(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"broken_module cannot be imported: {message}"):
        open_source("broken_module:make")


def test_size_that_a_network_of_timm_was_made_for() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1,), num_heads=(1,))
    assert open_source(model).sample.shape == "3x56x56"


def test_files_are_tried_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "it is a folder"), (Path("/proc/rows.csv"), "cannot write /proc/rows.csv")):
        assert main(["bench", "asvit_seed", "--csv", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_a_function_is_no_network() -> None:
    with pytest.raises(InputError, match="create_model is a function or class; give the network that it returns"):
        open_source(timm.create_model)
