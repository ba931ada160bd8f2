"""The contents of an export's formats; a kill leaves the old export or the new one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from asvit_fast import files, graph
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.export import export, open_network
from asvit_fast.files import to_json, write_folder
from asvit_fast.topology import Topology

TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
TESTS = Path(__file__).parent


def trained(path: Path, **arguments: Any) -> tuple[Path, torch.nn.Module]:
    """A checkpoint, and its network."""
    torch.manual_seed(0)
    model = timm.create_model("asvit", topology=TOPOLOGY, img_size=40, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    described = {
        "model": "asvit", "num_classes": 5, "img_size": 40, "model_kwargs": {"topology": TOPOLOGY},
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "crop_mode": "squash",
        "interpolation": "bilinear", "label_names": list("abcde"),
    }  # fmt: skip
    torch.save({"arch": "asvit", "args": {**described, **arguments}, "state_dict": model.state_dict()}, path)
    return path, model.eval()


PREPROCESSING = {
    "architecture": "asvit", "input_size": [3, 40, 40], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
    "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear", "label_names": list("abcde"),
}  # fmt: skip


# --------------------------------------------------------------------------- formats


def test_onnx(tmp_path: Path) -> None:
    """A map of 10 x 10 tokens, which windows and merging do not divide: ONNX Runtime gives torch's numbers."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, model = trained(tmp_path / "trained.pth.tar")
    folder = export(path, tmp_path / "model", format="onnx")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "model.onnx"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [list(value.shape) for value in session.get_inputs()] == [["batch", 3, 40, 40]]
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 40, 40)  # [B, 3, H, W]
        (found,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-5, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in metadata.items()} == PREPROCESSING


@pytest.mark.slow
def test_a_program_needs_torch_alone(tmp_path: Path) -> None:
    path, model = trained(tmp_path / "trained.pth.tar")
    folder = export(path, tmp_path / "model", format="exported")
    inside = {graph.METADATA: ""}
    torch.export.load(folder / "model.pt2", extra_files=inside)
    assert json.loads(inside[graph.METADATA]) == PREPROCESSING
    images = torch.randn(3, 3, 40, 40)  # [3, 3, H, W]
    torch.save(images, tmp_path / "images")
    program = [sys.executable, str(TESTS / "export_program.py"), str(folder / "model.pt2"), str(tmp_path / "images")]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "images.outputs")
    for found, expected in zip(outputs, (model(images), model(images[:1])), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_formats_side_by_side(tmp_path: Path) -> None:
    """Each replaces its own files and leaves the others'."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.onnx").write_bytes(b"of an earlier export")
    folder = export("test_vit", tmp_path / "model", img_size=96, num_classes=3, format="exported")
    export("test_vit", folder, img_size=96, num_classes=3)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "model.onnx", "model.pt2", "model.safetensors",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(InputError, match="format must be one of timm, onnx, exported, got 'tflite'"):
        export(TOPOLOGY, tmp_path / "model", format="tflite")
    missing = {"onnx", "onnxscript"}
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None if name in missing else object())
    assert main(["export", "no such run", "--to", str(tmp_path / "model"), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "needs onnx, onnxscript: pip install 'asvit-fast[onnx]'" in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_other_numbers_are_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's output is compared before the file is there."""
    load = torch.export.load

    class Wrong:
        def __init__(self, *arguments: Any) -> None:
            self.program = load(*arguments).module()

        def module(self) -> Any:
            return lambda images: self.program(images) + 1e-3

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(InputError, match="computes something else"):
        graph.save_program(torch.nn.Flatten(), tmp_path / "model.pt2", {"input_size": (3, 4, 4)})


def test_networks_that_cannot_be_followed(tmp_path: Path) -> None:
    class Stubborn(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    with pytest.raises(InputError, match=r"torch\.export cannot follow Stubborn") as caught:
        graph.to_program(Stubborn(), (3, 8, 8))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- folders


def test_modes_are_those_of_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = export(TOPOLOGY, tmp_path / "model", img_size=32, num_classes=3)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def exported_and_killed(target: Path, count: int, exchange: bool) -> bool:
    """An export in a process of its own, killed at its ``count``-th look at a folder or file; whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    torch.set_num_threads(1)
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if target.name in str(arguments) or (event == "ctypes.dlsym" and "renameat2" in str(arguments)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    if not exchange:
        files._put_folder = lambda scratch, target: False  # type: ignore[assignment]
    sys.addaudithook(audit)
    export(TOPOLOGY, target, seed=1, img_size=64, num_classes=5)
    os._exit(0)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, exchange: bool) -> None:
    """At any moment. Where folders cannot be exchanged, nothing that is taken for an export."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    if exchange and not files._put_folder(tmp_path / "one", tmp_path / "two"):
        pytest.skip("folders cannot be exchanged in one step here")
    old, new = (
        contents(export(TOPOLOGY, tmp_path / f"seed{seed}", seed=seed, img_size=size, num_classes=classes))
        for seed, size, classes in ((0, 32, 3), (1, 64, 5))
    )
    found = []
    for count in range(1, 100):
        target = export(TOPOLOGY, tmp_path / "at" / "model", img_size=32, num_classes=3)
        assert [path.name for path in target.parent.iterdir()] == ["model"]  # what a kill left is gone
        killed = exported_and_killed(target, count, exchange)
        complete = exchange or (target / "config.json").is_file()
        found.append(contents(target) if complete else None)
        if not killed:
            break
    assert found[0] == old and found[-1] == new and len(found) > 8
    assert all(one in (old, new) or (one is None and not exchange) for one in found)
    assert found == sorted(found, key=lambda one: 0 if one == old else 1 if one is None else 2)


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on other systems, on a mount point, for the current folder
        monkeypatch.setattr(files, "_put_folder", lambda scratch, target: False)
    for text in ("old", "new"):
        write_folder(tmp_path / "made" / "folder", lambda folder, t=text: [  # type: ignore[misc]
            (folder / name).write_text(t) for name in ("first", "last")
        ] and None, last="last")  # fmt: skip
        (tmp_path / "made" / "folder" / "another").write_text("kept")
    folder = tmp_path / "made" / "folder"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "first": "new", "last": "new", "another": "kept",
    }  # fmt: skip

    def fails(scratch: Path) -> None:
        (scratch / "first").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"):
        write_folder(folder, fails, last="last")
    assert (folder / "first").read_text() == "new" and [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_links_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export(TOPOLOGY, tmp_path / "link", img_size=32, num_classes=3)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "config.json").is_file()
    monkeypatch.chdir(tmp_path / "there")
    export(TOPOLOGY, ".", seed=1, img_size=32, num_classes=3)
    assert sorted(path.name for path in Path().iterdir()) == ["README.md", "config.json", "model.safetensors"]


# --------------------------------------------------------------------------- sizes and budgets


def write_run(directory: Path, **config: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(to_json(config))
    (directory / "trace.jsonl").write_text(to_json({"step": 0, "topology": TOPOLOGY, "most_probable": TOPOLOGY}) + "\n")
    (directory / "result.json").write_text(to_json({"kind": config["kind"], "topology": TOPOLOGY}))
    return directory


def test_runs_are_exported_at_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "scale", kind="scale", img_size=[64, 96], max_params=[100_000, 140_000])
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    count = sum(value.numel() for value in open_network(TOPOLOGY, 0, 1000, (64, 96)).built.model.parameters())
    printed = capsys.readouterr().out
    assert f"{count:,} parameters" in printed and "(the run allowed 140,000)" in printed and "3 x 64 x 96" in printed
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 96] and config["model_args"]["img_size"] == [64, 96]
    assert main(["export", str(run), "--to", str(tmp_path / "model"), "--img-size", "1024"]) == 0
    assert "MORE than the 140,000 that the run allowed" in capsys.readouterr().out

    search = write_run(tmp_path / "search", kind="search", img_size=128, budget={"params": [None, 1e6], "flops": None})
    network = open_network(search)
    assert network.limit == 1e6 and network.built.data_config()["input_size"] == (3, 128, 128)
    assert open_network(search, img_size=32).built.data_config()["input_size"] == (3, 32, 32)
    (search / "result.json").write_text(to_json({"kind": "search", "topology": 5}))
    with pytest.raises(InputError, match=r"result.json.*topology must be text, got 5"):
        open_network(search)
    with pytest.raises(InputError, match=r"img_size must be pixels"):
        open_network(write_run(tmp_path / "odd", kind="search", img_size="big"))


def test_named_models_and_sizes(tmp_path: Path) -> None:
    network = open_network("asvit_seed", img_size=64, num_classes=3)
    assert network.built.model.topology == Topology.parse("8,2,3|4,1,2|4,1,4|4,1,6|32")
    folder = export("test_resnet", tmp_path / "model", img_size=64, num_classes=3)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 64, 64)
    again = export(folder, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for options, message in (({"img_size": 96}, "is for images of 64x64"), ({"num_classes": 4}, "has 3 classes")):
        with pytest.raises(InputError, match=message):
            export(folder, tmp_path / "third", **options)
    path, _ = trained(tmp_path / "trained.pth.tar", label_names=["a", "", "c", "", "e"])
    config = json.loads((export(path, tmp_path / "fourth") / "config.json").read_text())
    assert config["label_names"] == {"0": "a", "2": "c", "4": "e"}


def test_fresh_networks_of_timm_keep_the_crop_of_their_size(tmp_path: Path) -> None:
    """timm tests resnet18 with another crop at 288 pixels; at 224 pixels its own counts."""
    model = timm.create_model(f"local-dir:{export('resnet18', tmp_path)}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"]) == ((3, 224, 224), 0.95)
