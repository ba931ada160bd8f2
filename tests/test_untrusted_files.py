"""Checkpoints and exported folders of strangers: an architecture and weights are taken from them, nothing else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import PretrainedCfg

from asvit_fast.errors import InputError
from asvit_fast.export import export
from asvit_fast.training.build import build_from_checkpoint
from asvit_fast.training.description import architecture_arguments, constructor_parameters

VIT = {"embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "img_size": 32}
NAME = "vit_tiny_patch16_224"
PORT = "http://127.0.0.1:9/weights.pth"  # nobody listens there


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, **VIT)


def write_checkpoint(path: Path, content: dict[str, Any] | None = None, **arguments: Any) -> Path:
    described = {"model": NAME, "num_classes": 3, "img_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    described["model_kwargs"] = {name: VIT[name] for name in ("embed_dim", "depth", "num_heads")}
    whole = {"arch": NAME, "args": {**described, **arguments}, "state_dict": network().state_dict()}
    torch.save({**whole, **(content or {})}, path)
    return path


def change(folder: Path, **fields: Any) -> Path:
    """Fields of an export's config.json; a dict is merged into the one that is there."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export(write_checkpoint(tmp_path / "trained.pth.tar"), tmp_path / "model")


# --------------------------------------------------------------------------- what is never taken

_touched: list[str] = []
_watched: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    network = event.startswith(("socket.connect", "socket.getaddrinfo", "urllib.Request"))
    files = event.startswith(("open", "os.", "shutil."))
    if network or (files and any(_watched[0] in str(item) for item in arguments)):
        _touched.append(f"{event} {arguments}")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may look into, watched, as the network is."""
    folder = tmp_path / "somebody's"
    folder.mkdir()
    torch.save({name: value + 1 for name, value in network().state_dict().items()}, folder / "weights.pth")
    if not hasattr(sys, "_asvit_fast_audit"):  # a hook stays for the life of the process
        sys.addaudithook(_audit)
        sys._asvit_fast_audit = True  # type: ignore[attr-defined]
    _touched.clear()
    _watched[:] = [str(folder)]
    yield folder
    _watched.clear()


def attacks(folder: Path) -> dict[str, dict[str, Any]]:
    """Arguments of a network that make timm fetch or open something."""
    file = str(folder / "weights.pth")
    return {
        "pretrained": {"pretrained": True},
        "url": {"pretrained": True, "pretrained_cfg": {"url": PORT}},
        "file": {"pretrained": True, "pretrained_cfg": {"file": file}},
        "hub": {"pretrained": True, "pretrained_cfg": {"hf_hub_id": "somebody/weights", "source": "hf-hub"}},
        "folder": {"pretrained": True, "pretrained_cfg": {"file": str(folder), "source": "local-dir"}},
        "tag": {"pretrained": True, "pretrained_cfg": "augreg_in21k"},
        "overlay": {"pretrained": True, "pretrained_cfg_overlay": {"file": file}},
        "custom": {"pretrained": True, "pretrained_cfg_overlay": {"file": file, "custom_load": True}},
        "path": {"checkpoint_path": file},
        "cache": {"pretrained": True, "cache_dir": str(folder / "cache"), "pretrained_cfg_overlay": {"url": PORT}},
        "loose": {"pretrained_strict": False},
        "pruned": {"pruned": True},
        "wrapper": {"features_only": True, "out_indices": [0]},
        "device": {"device": "meta", "dtype": "nonsense"},
    }


@pytest.mark.parametrize("attack", list(attacks(Path())))
def test_checkpoints_choose_no_weights(tmp_path: Path, outside: Path, attack: str) -> None:
    kwargs = {**{name: VIT[name] for name in ("embed_dim", "depth", "num_heads")}, **attacks(outside)[attack]}
    path = write_checkpoint(tmp_path / "checkpoint.pth.tar", model_kwargs=kwargs, **attacks(outside)[attack])
    weights = build_from_checkpoint(path).model.state_dict()
    folder = export(path, tmp_path / "model")
    assert _touched == []
    assert all(torch.equal(value, weights[name]) for name, value in network().state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert str(outside) not in json.dumps(config) and PORT not in json.dumps(config)


@pytest.mark.parametrize("attack", list(attacks(Path())))
def test_exported_folders_choose_no_weights(exported: Path, outside: Path, attack: str) -> None:
    fields = attacks(outside)[attack]
    given = fields.get("pretrained_cfg_overlay", fields.get("pretrained_cfg"))
    change(exported, model_args=fields, pretrained_cfg={**fields, **(given if isinstance(given, dict) else {})})
    weights = build_from_checkpoint(exported).model.state_dict()
    assert _touched == []
    assert all(torch.equal(value, weights[name]) for name, value in network().state_dict().items())


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:/tmp", "../model", "vit_tiny_patch16_225"])
def test_names_are_of_timms_list(tmp_path: Path, exported: Path, outside: Path, name: str) -> None:
    with pytest.raises(InputError, match="neither a topology nor a model"):
        build_from_checkpoint(write_checkpoint(tmp_path / "other.pth.tar", {"arch": name}))
    with pytest.raises(InputError, match="neither a topology nor a model"):
        build_from_checkpoint(change(exported, architecture=name))
    assert _touched == []


def test_an_architectures_arguments() -> None:
    """Those of its constructor, for timm's ways of making networks and ours; none that says where weights are."""
    for name, argument in (
        (NAME, "embed_dim"),
        ("deit_tiny_distilled_patch16_224", "depth"),
        ("swin_tiny_patch4_window7_224", "window_size"),
        ("resnet18", "block_args"),
        ("convnext_tiny", "dims"),
        ("asvit_small", "topology"),
        ("asvit", "attn_scale"),
    ):
        known = constructor_parameters(name)
        assert argument in known and {"num_classes", "in_chans"} <= known
        assert not known & {"pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "pruned"}
        assert not known & {"url", "file", "hf_hub_id", "source", "state_dict"} & set(vars(PretrainedCfg()))
    with pytest.raises(InputError, match="has wings, which asvit does not know"):
        architecture_arguments("asvit", {"wings": 2}, "model_kwargs")


# --------------------------------------------------------------------------- fields of another type

ITSELF: list[Any] = []
ITSELF.append(ITSELF)
BAD_FIELDS: list[tuple[str, Any]] = [
    ("model_kwargs", {"depths": ITSELF}), ("mean", [10**400] * 3), ("crop_pct", 10**400),
    ("img_size", "32"), ("img_size", -32), ("img_size", [32]), ("img_size", True), ("img_size", 32.5),
    ("num_classes", 2.5), ("num_classes", -1), ("num_classes", "many"), ("in_chans", 0), ("in_chans", [3]),
    ("mean", "grey"), ("mean", [0.5, "x", 0.5]), ("mean", 0.5), ("mean", [math.nan] * 3), ("mean", []),
    ("std", [0.0, 0.2, 0.2]), ("std", {"r": 1}), ("crop_pct", "most"), ("crop_pct", 0), ("crop_pct", 1e9),
    ("crop_pct", math.nan), ("crop_mode", "diagonal"), ("crop_mode", 1), ("interpolation", "cubist"),
    ("interpolation", 3), ("label_names", 5), ("label_names", [1, 2, 3]), ("model", 7),
    ("model_kwargs", [1]), ("model_kwargs", {1: 2}), ("model_kwargs", "depth=1"), ("model_kwargs", {"img_size": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_fields_of_checkpoints(tmp_path: Path, name: str, value: Any) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth.tar", **{name: value})
    with pytest.raises(InputError, match=rf"checkpoint\.pth\.tar.*{name}") as caught:
        build_from_checkpoint(path).data_config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"args": [1, 2]},
        {"args": "--model vit"},
        {"args": torch.ones(2)},
        {"arch": 3},
        {"arch": None, "args": None},
        {"state_dict": {1: 2}},
        {"state_dict": {"head.weight": "heavy"}},
        {"state_dict": {}},
        {"args": {"model": NAME, "model_kwargs": {"depth": "deep"}}},
        {"args": {"model": NAME, "model_kwargs": {"embed_dim": [8], "norm_layer": "no such"}}},
    ],
)
def test_parts_of_checkpoints(tmp_path: Path, content: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth.tar", content)
    with pytest.raises(InputError) as caught:
        build_from_checkpoint(path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04 no archive", b"\x80\x02}q\x00(K\x01", b"{}"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint\.pth\.tar' is not a checkpoint .* safely: it is damaged, or"):
        build_from_checkpoint(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": 3},
        {"architecture": None},
        {"num_classes": "three"},
        {"num_classes": 4},
        {"pretrained_cfg": [1]},
        {"model_args": "depth"},
        {"model_args": {"depth": "deep"}},
        {"model_args": {"wings": 2}},
        {"model_args": {"depth": 2}},
        {"model_args": {"img_size": 3.5}},
        {"label_names": 4},
        *({"pretrained_cfg": {name: value}} for name, value in (
            ("input_size", [3, 32]), ("input_size", "big"), ("mean", "grey"), ("std", [0, 0, 0]), ("crop_pct", "all"),
            ("crop_mode", 4), ("interpolation", "cubist"), ("fixed_input_size", "yes"), ("first_conv", 4),
            ("classifier", {}), ("test_input_size", [1]), ("pool_size", "x"), ("label_names", 3),
        )),
    ],
)  # fmt: skip
def test_fields_of_exports(exported: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        build_from_checkpoint(change(exported, **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "null", '{"architecture": NaN}', '{"a": ', "[" * 10**5])
def test_configurations_that_are_none(exported: Path, content: str) -> None:
    (exported / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        build_from_checkpoint(exported)
    (exported / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"config\.json"):
        build_from_checkpoint(exported)


def test_statistics_of_other_channels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mean must be one number or 3"):
        build_from_checkpoint(write_checkpoint(tmp_path / "two.pth.tar", mean=[0.5, 0.5])).data_config()
