"""One grammar: whatever names a network is understood in the same way by every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from asvit_fast.errors import InputError
from asvit_fast.export import export
from asvit_fast.files import to_json
from asvit_fast.topology import Topology
from asvit_fast.what import resolve, resolve_topology

TOPOLOGY = "4,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,16"


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(TOPOLOGY, tmp_path_factory.mktemp("what") / "model", img_size=32, num_classes=3)


def write_run(folder: Path, kind: str, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json({"kind": kind}))
    (folder / "trace.jsonl").write_text(to_json({"step": 0, "topology": TOPOLOGY, "most_probable": TOPOLOGY}) + "\n")
    if finished:
        (folder / "result.json").write_text(to_json({"topology": TOPOLOGY}))
    return folder


def test_topologies_and_names() -> None:
    assert resolve(TOPOLOGY).fresh == Topology.parse(TOPOLOGY)
    assert resolve(Topology.parse(TOPOLOGY)).fresh == Topology.parse(TOPOLOGY)
    for name in ("asvit_small", "resnet18", "squeezenet1_1", "vit_tiny_patch16_224.augreg_in21k"):
        target = resolve(name)
        assert (target.fresh, target.weights, target.run) == (name, None, None)


@pytest.mark.parametrize("kind", ["search", "scale"])
def test_runs(kind: str, tmp_path: Path) -> None:
    for where in (write_run(tmp_path / "alone", kind), write_run(tmp_path / "both" / kind, kind).parent):
        target = resolve(where)
        assert target.fresh == resolve_topology(str(where)) == Topology.parse(TOPOLOGY)
        assert target.run is not None


def test_weights(export_folder: Path) -> None:
    for where in (export_folder, str(export_folder)):
        target = resolve(where)
        assert target.weights == export_folder
        assert target.load().model.num_classes == 3
        assert target.topology == Topology.parse(TOPOLOGY)


def test_a_name_comes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "resnet18", "search")
    monkeypatch.chdir(tmp_path)
    assert resolve("resnet18").fresh == "resnet18"
    assert resolve("./resnet18").fresh == Topology.parse(TOPOLOGY)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("resnet_18", r"neither a topology nor a model of timm or torchvision; did you mean resnet18"),
        ("runs/nowhere", r"'runs/nowhere' does not exist; give a topology, the name"),
        ("nowhere.pth", r"does not exist"),
        ("8,2,3|4,1,2", r"expected 'K,S,E"),
    ],
)
def test_what_cannot_be_used(what: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(what)


def test_unfinished_runs_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not finished"):
        resolve(write_run(tmp_path / "run", "search", finished=False))
    with pytest.raises(InputError, match="holds neither a run nor an export"):
        resolve(tmp_path)


def test_networks_without_a_topology_are_refused_where_one_is_needed() -> None:
    with pytest.raises(InputError, match="resnet18 is no As-ViT"):
        resolve_topology("resnet18")
    assert resolve_topology("asvit_small") == Topology.parse("asvit_small")


def test_a_training_beside_other_runs_must_be_named(tmp_path: Path) -> None:
    write_run(tmp_path / "scale", "scale")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "last.pth.tar").touch()
    with pytest.raises(InputError, match="holds a training and other runs; give"):
        resolve(tmp_path)
    assert resolve(tmp_path, to_train=True).fresh == Topology.parse(TOPOLOGY)
    assert resolve(tmp_path / "train").weights == tmp_path / "train"


def test_exported_folders_by_timms_name_and_by_their_weights(export_folder: Path) -> None:
    assert resolve(f"local-dir:{export_folder}").weights == export_folder
    assert resolve(export_folder / "model.safetensors").load().model.num_classes == 3


@pytest.mark.parametrize("what", ["", " "])
def test_nothing_is_not_the_current_folder(what: str) -> None:
    with pytest.raises(InputError, match="WHAT is empty"):
        resolve(what)


def test_graphs_cannot_be_taken_apart(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(InputError, match=r"model\.onnx runs, but cannot be taken apart"):
        resolve(tmp_path)
