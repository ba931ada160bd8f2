"""kernels/tile_table.py: tables, look-ups, what happens where a table lacks something, a user's table."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernel_inspection import Launch, recorded_launches

from asvit_fast.kernels import tile_table, window_attention
from asvit_fast.kernels.window_attention_geometry import tails_of

ATTENTION = ("single_tile", "single_tile_backward", "tiled", "tiled_backward", "bias_gradient")
GPU = "NVIDIA H200 (141 GB)"
FAMILY = f"hopper/{GPU}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody's own tables."""
    monkeypatch.setenv("ASVIT_FAST_TILES", str(tmp_path))
    tile_table.forget()
    yield tmp_path
    tile_table.forget()


def write(kernels: dict) -> Path:
    path = tile_table.user_table(GPU)
    path.write_text(json.dumps({"gpu": GPU, "kernels": kernels}))
    tile_table.forget()
    return path


FEATURES = ("bits", "axes", "tokens", "pixels", "block_d", "outputs")


def choose(kernel: str, family: str, tokens: int, head_dim: int, bits: int, axes: int = 2) -> dict:
    """Tiles as attention looks them up."""
    return tile_table.choose(kernel, family, bits=bits, tokens=tokens, block_d=tile_table.block(head_dim), axes=axes)


@pytest.mark.parametrize("family", tile_table.FAMILIES.values())
def test_shipped_tables(family, root):
    table = tile_table.read_table(root / "kernels" / "tiles" / f"{family}.json")
    assert set(ATTENTION) <= set(table)
    for kernel, rows in table.items():
        keys = [tuple(sorted((k, v) for k, v in row.items() if k in FEATURES)) for row in rows]
        assert len(set(keys)) == len(keys), f"{kernel}: two rows of one shape"
        for row in rows:
            assert all(value & (value - 1) == 0 for name, value in row.items() if name.startswith("block_"))
            assert row["num_warps"] in (1, 2, 4, 8)
            own = {name: value for name, value in row.items() if name in FEATURES}
            found = tile_table.nearest(kernel, family, **own)
            assert found == {name: value for name, value in row.items() if name not in own}


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("capability", tile_table.FAMILIES)
def test_every_shape_has_tiles(kernel, capability):
    """Token counts that change during training look up the same rows: nothing depends on them but tails."""
    shapes = itertools.product((1, 9, 49, 50, 144, 196, 343, 784, 3136), (1, 4, 22, 45, 96, 300), (16, 32), (2, 3))
    for tokens, head_dim, bits, axes in shapes:
        options = choose(kernel, capability, tokens, head_dim, bits, axes)
        assert {"num_warps", "num_stages", "enable_fp_fusion"} <= set(options)
        tails = tails_of(tokens, 2 * tokens, options) if "BLOCK_M" in options else {}
        for name, tail in tails.items():
            size, count = options[name.replace("TAIL", "BLOCK")], tokens * (2 if name.endswith("N") else 1)
            assert 16 <= tail <= size
            assert tail >= count % size


@pytest.mark.parametrize(
    ("kernel", "rows"), [("tiled", "block_m"), ("tiled_backward", "block_m"), ("tiled_backward", "block_n")]
)
def test_no_more_warps_than_rows_on_hopper(kernel, rows):
    """Of float32: four warps take 64 rows of a product there; with eight on 64 Triton 3.6's products have read outside
    of shared memory (compute-sanitizer on an H200)."""
    table = tile_table.read_table(Path(tile_table.__file__).parent / "tiles" / "hopper.json")
    wide = [row for row in table[kernel] if row["bits"] == 32 and row[rows] >= 64]
    assert all(16 * row["num_warps"] <= row[rows] for row in wide), wide


def test_nearest_shape(folder):
    rows = [
        {"bits": 16, "tokens": 49, "block_d": 32, "block_m": 64, "num_warps": 1, "num_stages": 1},
        {"bits": 16, "tokens": 784, "block_d": 32, "block_m": 64, "num_warps": 2, "num_stages": 1},
        {"bits": 16, "tokens": 49, "block_d": 16, "block_m": 64, "num_warps": 4, "num_stages": 1},
        {"bits": 32, "tokens": 49, "block_d": 16, "block_m": 64, "num_warps": 8, "num_stages": 1},
    ]
    write({"new": rows})

    def warps(**features):
        return tile_table.nearest("new", FAMILY, **features)["num_warps"]

    assert [warps(bits=16, tokens=tokens, block_d=32) for tokens in (1, 49, 190, 200, 9999)] == [1, 1, 1, 2, 2]
    assert warps(bits=16, tokens=400, block_d=16) == 4  # another width is farther than another number of tokens
    assert warps(bits=32, tokens=400, block_d=32) == 8  # another type is farther still
    assert tile_table.nearest("new", FAMILY, bits=16, channels=96)["block_m"] == 64  # a feature that no row has


def test_wider_tiles_get_smaller_blocks():
    narrow = tile_table.nearest("tiled", "hopper", bits=16, tokens=784, block_d=128)
    wide = tile_table.nearest("tiled", "hopper", bits=16, tokens=784, block_d=512)
    assert wide["block_m"] * wide["block_n"] * 4 == narrow["block_m"] * narrow["block_n"]
    huge = tile_table.nearest("tiled", "hopper", bits=64, tokens=784, block_d=4096)
    assert (huge["block_m"], huge["block_n"], huge["num_warps"]) == (16, 16, 8)


def test_what_tiles_do_not_depend_on(folder):
    """A width that all rows share says nothing."""
    row = {"bits": 16, "block_d": 64, "block_m": 64, "num_warps": 4, "num_stages": 1}
    write({"new": [row | {"tokens": 64}, row | {"tokens": 256}]})
    assert tile_table.nearest("new", FAMILY, bits=16, tokens=64, block_d=1024)["block_m"] == 64
    assert choose("new", FAMILY, 64, 1024, 16)["BLOCK_M"] == 64


def test_three_axes():
    """Rows of their own, however near the others are; those that do not say so are for all."""
    assert choose("tiled", "hopper", 343, 16, 32, axes=3)["BLOCK_N"] == 32
    assert choose("tiled", "hopper", 343, 16, 32)["BLOCK_N"] == 64
    assert choose("tiled", "hopper", 343, 16, 16, axes=3) == choose("tiled", "hopper", 343, 16, 16)


def test_other_families_and_kernels(monkeypatch):
    only = {"new": [{"bits": 16, "num_warps": 2, "num_stages": 3}]}
    known = tile_table.read_table
    monkeypatch.setattr(tile_table, "read_table", lambda path: only if path.stem == "blackwell" else known(path))
    assert tile_table.nearest("new", "hopper", bits=16) == {"num_warps": 2, "num_stages": 3}
    assert tile_table.nearest("tiled", "blackwell", bits=16, tokens=784, block_d=16)["block_m"] > 0
    with pytest.raises(tile_table.TileTableError, match="nonsense"):
        tile_table.nearest("nonsense", "hopper", bits=16)


def test_family_of_a_device(monkeypatch):
    assert tile_table.family_of(torch.device("cpu")) == "hopper"
    for number, (capability, family) in enumerate({8: "ampere", 9: "hopper", 10: "blackwell", 12: "ampere"}.items()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=capability: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        assert tile_table.family_of(torch.device("cuda", 90 + number)) == f"{family}/A GPU"
    tile_table.family_of.cache_clear()


def test_assuming_a_family():
    with tile_table.assuming("blackwell"):
        assert tile_table.family_of(torch.device("cpu")) == "blackwell"
    assert tile_table.family_of(torch.device("cpu")) == "hopper"


# --------------------------------------------------------------------------- a user's table


def test_a_users_rows_go_first(folder):
    shape = {"bits": 16, "tokens": 784, "block_d": 16}
    shipped = choose("tiled", FAMILY, 784, 8, 16)
    other = choose("tiled", FAMILY, 784, 45, 16)
    row = shape | {"block_m": 32, "block_n": 128, "num_warps": 2, "num_stages": 4, "tuned": {"triton": "3.9.0"}}
    path = write({"tiled": [row]})
    assert path.parent == folder and path.name == "nvidia-h200-141-gb.json"
    chosen = choose("tiled", FAMILY, 784, 8, 16)
    assert chosen == {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 2, "num_stages": 4, "enable_fp_fusion": True}
    assert tails_of(784, 784, chosen) == {"TAIL_M": 16, "TAIL_N": 16}
    assert chosen != shipped
    assert choose("tiled", FAMILY, 784, 45, 16) == other
    assert choose("tiled", "hopper/Another GPU", 784, 8, 16) == shipped
    assert choose("tiled", "90", 784, 8, 16) == shipped


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"kernels": 3}',
        '{"kernels": {"tiled": [3]}}',
        '{"kernels": {"tiled": [{"bits": 16}]}}',
        '{"kernels": {"tiled": [{"bits": 16, "num_warps": "4", "num_stages": 2}]}}',
        '{"kernels": {"tiled": [{"bits": 16, "num_warps": 0, "num_stages": 2}]}}',
        '{"kernels": {"tiled": [{"bits": 16, "num_warps": true, "num_stages": 2}]}}',
        b"\xff\xfe",
    ],
)
def test_a_bad_file_names_itself(content):
    path = tile_table.user_table(GPU)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(tile_table.TileTableError) as caught:
        choose("tiled", FAMILY, 784, 8, 16)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_a_users_tables_are(monkeypatch, tmp_path):
    monkeypatch.setenv("ASVIT_FAST_TILES", "~/mine")
    assert tile_table.user_folder() == Path.home() / "mine"
    monkeypatch.delenv("ASVIT_FAST_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert tile_table.user_folder() == tmp_path / "asvit_fast" / "tiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tile_table.user_folder() == Path.home() / ".cache" / "asvit_fast" / "tiles"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tile_table.user_folder() == Path.home() / "Library" / "Caches" / "asvit_fast" / "tiles"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert tile_table.user_folder() == tmp_path / "asvit_fast" / "tiles"


def test_trying():
    before = choose("tiled", "90", 784, 8, 16)
    trial = {"block_m": 128, "block_n": 16, "num_warps": 8, "num_stages": 1}
    with contextlib.suppress(RuntimeError), tile_table.trying("tiled", trial):
        assert tile_table.nearest("tiled", "hopper", bits=16, tokens=1, block_d=16) == trial
        assert choose("tiled", "90", 784, 8, 16)["BLOCK_M"] == 128
        assert choose("tiled_backward", "90", 784, 8, 16)["BLOCK_M"] != 128
        raise RuntimeError
    assert choose("tiled", "90", 784, 8, 16) == before


def test_launches_are_decided_once_for_a_shape():
    """And again when the tiles change, or what torch's own products may do."""
    qkv, statistics = torch.empty(1, 9, 9, 24), torch.empty(2, 1, 9, 9, 1)

    def launch() -> Launch:
        with recorded_launches() as launches:
            nothing = (None,) * 6
            window_attention.window_attention(qkv, *nothing, 1, [9, 9], [0, 0], [], 1.0, "masked", statistics)
        return launches[0]

    before, decided = launch(), window_attention._forward_launcher.cache_info()
    assert launch() == before
    assert window_attention._forward_launcher.cache_info().misses == decided.misses
    trial = {"block_m": 128, "block_n": 16, "num_warps": 8, "num_stages": 1}
    with tile_table.trying("tiled", trial):
        tried = launch()
    assert (tried.constants["BLOCK_M"], tried.options["num_warps"]) == (128, 8) and launch() == before
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert launch().constants["SHAPE"].precision == "tf32" != before.constants["SHAPE"].precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_tables_are_installed(root, tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    environment = os.environ | {"ASVIT_FAST_BUILD": "none"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    installed = {path.name for path in (tmp_path / "asvit_fast" / "kernels" / "tiles").iterdir()}
    assert installed == {f"{family}.json" for family in tile_table.FAMILIES.values()}
