"""Exported folders: timm loads them and gives the same network back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from asvit_fast.errors import InputError
from asvit_fast.export import export
from asvit_fast.files import to_json
from asvit_fast.topology import Topology
from asvit_fast.what import resolve_topology

TOPOLOGY = "4,2,2,1|2,1,2,2|2,1,2,1|2,1,2,1|16,16"


def write_run(directory: Path, kind: str, finished: bool = True) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(to_json({"kind": kind}))
    record = {"step": 0, "topology": TOPOLOGY, "most_probable": TOPOLOGY}
    (directory / "trace.jsonl").write_text(to_json(record) + "\n")
    if finished:
        (directory / "result.json").write_text(to_json({"kind": kind, "topology": TOPOLOGY}))
    return directory


def original(seed: int, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("asvit", topology=TOPOLOGY, **options).eval()


@pytest.mark.parametrize(("img_size", "num_classes"), [(32, 10), ((32, 64), 1000), (64, 0)])
def test_round_trip(tmp_path: Path, img_size: int | tuple[int, int], num_classes: int) -> None:
    target = export(TOPOLOGY, tmp_path / "model", seed=3, num_classes=num_classes, img_size=img_size)
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    image = torch.randn(2, 3, height, width)  # [2, 3, H, W]
    expected = original(3, img_size=img_size, num_classes=num_classes)(image)
    assert torch.equal(loaded(image), expected)
    assert expected.shape[1] == (num_classes or Topology.parse(TOPOLOGY).features)
    assert not torch.equal(original(4, img_size=img_size, num_classes=num_classes)(image), expected)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)  # [3]
    torch.manual_seed(0)
    export(TOPOLOGY, tmp_path / "model", img_size=32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["search", "scale"])
def test_run_directories(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "run", kind)
    export(run, tmp_path / "model", img_size=32, num_classes=10)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "asvit"
    assert config["model_args"]["topology"] == TOPOLOGY


def test_sources() -> None:
    topology = Topology.parse(TOPOLOGY)
    assert resolve_topology(topology) == resolve_topology(TOPOLOGY) == topology


def test_of_two_runs_the_scaled_one_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "search", "search", finished=False)
    write_run(tmp_path / "scale", "scale")
    assert str(resolve_topology(tmp_path)) == TOPOLOGY


def test_unfinished_run_names_its_topology(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finished") as caught:
        export(write_run(tmp_path / "run", "search", finished=False), tmp_path / "model")
    assert TOPOLOGY in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", "8,2,3|4,1,2"])
def test_neither_topology_nor_run(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError):
        export(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_export_replaces_an_export_but_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    export(TOPOLOGY, target, seed=0, img_size=32, num_classes=10)
    before = (target / "model.safetensors").read_bytes()
    export(TOPOLOGY, target, seed=1, img_size=32, num_classes=10)
    assert (target / "model.safetensors").read_bytes() != before

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(InputError, match="holds other files"):
        export(TOPOLOGY, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    with pytest.raises(InputError, match="is a file"):
        export(TOPOLOGY, tmp_path / "thesis" / "chapter.tex")


def test_other_models_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(InputError, match="holds other files"):
        export(TOPOLOGY, tmp_path)
    with pytest.raises(InputError, match="holds other files"):  # a run directory has a configuration too
        export(TOPOLOGY, write_run(tmp_path / "run", "search"))


@pytest.mark.parametrize("use_ema", [False, True])
def test_trained_weights(tmp_path: Path, use_ema: bool) -> None:
    """The best checkpoint of a training's run directory."""
    from training_program import CLASSES, SIZE, run

    result = run(tmp_path / "train")
    best = torch.load(tmp_path / "train" / "model_best.pth.tar", weights_only=True)
    target = export(tmp_path / "train", tmp_path / "model", use_ema=use_ema)
    loaded = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    assert loaded.num_classes == CLASSES and loaded.img_size == (SIZE, SIZE)
    for name, value in best["state_dict_ema" if use_ema else "state_dict"].items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert type(loaded) is type(result.model)
