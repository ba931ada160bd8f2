"""The card of an exported network, and its way to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import training_program
from test_export_formats import TOPOLOGY, trained, write_run

import asvit_fast as af
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.export import export


def test_card_of_a_training(tmp_path: Path) -> None:
    training_program.run(tmp_path / "train")
    (tmp_path / "train" / "starts.jsonl").write_text(json.dumps({"command": "asvit-fast train X --out train"}) + "\n")
    text = (export(tmp_path / "train", tmp_path / "model") / "README.md").read_text()
    best = training_program.run(tmp_path / "train").best
    assert best is not None
    top1 = max(best["top1"], best.get("ema_top1", 0.0))
    for fact in (
        f"- **Topology:** `{training_program.TOPOLOGY}`",
        "- **Schedule:** 1:4,1:2,1:1 (epochs : times fewer tokens per side), ",
        "- **Training:** 3 of 3 epochs, 48 images an epoch, 8 an update",
        f"- **Top-1:** {top1:.2f} %",
        "  - `asvit-fast train X --out train`",
        "timm.create_model('local-dir:model', pretrained=True)",
        "@inproceedings{chen2022asvit",
    ):
        assert fact in text, fact
    assert str(tmp_path) not in text


def test_an_export_of_an_export_knows_what_the_first_knew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training_program.run(tmp_path / "train")
    first = (export(tmp_path / "train", tmp_path / "a" / "model") / "README.md").read_text()
    again = export(tmp_path / "a" / "model", tmp_path / "b" / "model")
    assert (again / "README.md").read_text() == first and "**Top-1:**" in first
    export(again, again, format="exported")
    text = (again / "README.md").read_text()
    assert "**Top-1:**" in text and "extra_files=preprocessing" in text
    code = text[text.index("import torch") :].partition("```")[0].replace("'model/", f"'{again}/")
    names: dict[str, Any] = {}
    exec(code, names)
    assert json.loads(names["preprocessing"]["asvit_fast.json"])["architecture"]
    fresh = export(TOPOLOGY, tmp_path / "fresh", img_size=32)
    assert main(["export", str(fresh), "--to", str(tmp_path / "second")]) == 0
    assert "not trained)" in capsys.readouterr().out
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["asvit_fast"]["trained"] is False
    assert "- **Weights:** fresh, not trained" in (tmp_path / "second" / "README.md").read_text()
    config["asvit_fast"]["facts"] = {"Schedule": {"no": "text"}}
    (tmp_path / "second" / "config.json").write_text(json.dumps(config))
    assert "Schedule" not in (export(tmp_path / "second", tmp_path / "third") / "README.md").read_text()


def test_card_of_a_search(tmp_path: Path) -> None:
    run = write_run(tmp_path / "search", kind="search", img_size=32, convention="reference")
    scores = {"length_distortion": 2.5, "ntk_condition": "inf"}
    (run / "result.json").write_text(json.dumps({"kind": "search", "topology": TOPOLOGY, **scores}))
    text = (export(run, tmp_path / "model") / "README.md").read_text()
    assert "- **Weights:** fresh, not trained" in text and "32 x 32" in text
    assert "(reference convention):**\n  - length distortion 2.5\n  - ntk condition inf\n" in text


def test_a_card_of_somebody_else_is_kept(tmp_path: Path) -> None:
    folder = export(TOPOLOGY, tmp_path / "model", img_size=32)
    export(TOPOLOGY, folder, img_size=64)
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(InputError, match=r"holds other files \(README.md\)"):
        export(TOPOLOGY, folder, img_size=32)
    assert (folder / "README.md").read_text() == "# Mine\n"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["timm", "onnx", "exported"])
def test_accelerated_networks_are_written_as_their_package_has_them(tmp_path: Path, format: str) -> None:
    """To 1e-4 of what the accelerated network gives; the network itself stays accelerated."""
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, depths=(1, 1, 2, 1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    swapped = len(af.accelerate(model).swapped)
    folder = export(model, tmp_path / "model", format=format)
    images = torch.randn(3, 3, 224, 224)  # [B, 3, H, W]
    with torch.no_grad():
        if format == "timm":
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            assert {type(module).__module__.split(".")[0] for module in loaded.modules()} == {"timm", "torch"}
            found = loaded(images)  # [B, 10]
        elif format == "onnx":
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])  # [B, 10]
        else:
            found = torch.export.load(folder / "model.pt2").module()(images)  # [B, 10]
        torch.testing.assert_close(found, model(images), rtol=0, atol=1e-4)
    assert len(af.accelerate(model).swapped) == swapped > 30


# --------------------------------------------------------------------------- the Hub


class Hub:
    """The answers of huggingface_hub's client, which has no network here; ``files`` is what was uploaded."""

    def __init__(self, **options: Any) -> None:
        pass

    files: dict[str, bytes] = {}  # noqa: RUF012

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, **options: Any) -> bool:
        return False

    def upload_folder(self, folder_path: str, **options: Any) -> None:
        Hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is uploaded is what was written, but for the line of the card that loads it."""
    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "of somebody")
    path, _ = trained(tmp_path / "trained.pth.tar")
    target = tmp_path / "model"
    assert main(["export", str(path), "--to", str(target), "--push-to-hub", "me/tiny"]) == 0
    assert "hf-hub:me/tiny" in capsys.readouterr().out
    for name in ("config.json", "model.safetensors"):
        assert Hub.files[name] == (target / name).read_bytes()
    card = Hub.files["README.md"].decode()
    assert "# Model card for tiny" in card and "timm.create_model('hf-hub:me/tiny', pretrained=True)" in card
    assert f"`{TOPOLOGY}`" in card


def test_what_the_hub_needs_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for options, message in (
        ({"push_to_hub": "me/tiny"}, "needs a token of the Hugging Face Hub: hf auth login, or set HF_TOKEN"),
        ({"push_to_hub": "me/tiny", "format": "onnx"}, "leave out the format onnx"),
        ({"push_to_hub": "https://x/y"}, "must be the name of a repository, OWNER/NAME"),
    ):
        with pytest.raises(InputError, match=message):
            export(TOPOLOGY, tmp_path / "model", img_size=32, **options)
    assert not (tmp_path / "model").exists()
