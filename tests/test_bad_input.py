"""Every mistake ends with one clear line on stderr and exit code 2, and loses nothing that is on disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import asvit_fast as af
from asvit_fast.cli import main
from asvit_fast.errors import InputError
from asvit_fast.files import read_jsonl

TOPOLOGY = "4,2,2|2,1,2|2,1,2|2,1,2|16"
TINY = ["--img-size", "32", "--repeats", "1", "--thetas", "2", "--batch", "4"]
SEARCH = ["search", "--steps", "3", "--width", "16", *TINY, "--quiet"]
SCALE = ["scale", TOPOLOGY, "--max-steps", "1", *TINY, "--quiet"]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):
    """Run the program; it must end with exit code 2 and one line that holds every one of the given words."""

    def run(arguments: list[str], *words: str) -> str:
        code = main(arguments)
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line]
        assert code == 2, captured
        assert len(lines) == 1, lines
        assert lines[0].startswith("asvit-fast: error: ")
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["search"], "--out"),
        (["scale", "--out", "x"], "TOPOLOGY"),
        (["search", "--out", "x", "--step", "3"], "--step"),
        (["search", "--out", "x", "--steps", "0"], "--steps"),
        (["search", "--out", "x", "--params", "5M:1M"], "--params"),
        (["search", "--out", "x", "--params", "5M"], "LOW:HIGH"),
        (["search", "--out", "x", "--space", "K9=3"], "K9"),
        (["search", "--out", "x", "--convention", "mine"], "--convention"),
        (["search", "--out", "x", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["search", "--out", ""], "out must name a folder"),
        (
            ["score", TOPOLOGY, "--seed", "1e20"],
            "--seed: expected a whole number from 0 to 9223372036854775807",
        ),
        (["score", TOPOLOGY, "--seed", "-1"], "--seed"),
        (["train", TOPOLOGY, "--data", "x", "--out", "y", "--seed", "0.5"], "--seed"),
        (["train", TOPOLOGY, "--data", "x", "--out", "y", "--model-kwargs", "x={"], "x: cannot read '{'"),
        (["score", TOPOLOGY, "--device", "mps"], "'mps' cannot be used: torch"),
        (["score", TOPOLOGY, "--device", "meta"], "holds no numbers"),
        (["serach", "--out", "x"], "did you mean search?"),
        (["search", "--out", "x", "--setps=3"], "did you mean --steps?"),
        (["score", TOPOLOGY, "--metrics", "accuracy"], "accuracy"),
        (["score", TOPOLOGY, "--metrics", ""], "metric"),
        (["score", TOPOLOGY, "--img-size", "8"], "8"),
    ],
)
def test_options(fails, arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails(arguments, word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "topology", ["8,2,3|4,1,2|4,1,4|4,1,6", "8,2,x|4,1,2|4,1,4|4,1,6|32", "8,0,3|4,1,2|4,1,4|4,1,6|32", "no_such_model"]
)
def test_topology(fails, topology: str, tmp_path: Path) -> None:
    fails(["score", topology, *TINY], topology)
    if "|" in topology:
        fails(["scale", topology, "--out", str(tmp_path / "run"), *TINY], topology)
        fails(["export", topology, "--to", str(tmp_path / "model")], topology)
    assert not list(tmp_path.iterdir())


def test_image_folders(fails, tmp_path: Path) -> None:
    folder, run = tmp_path / "images", tmp_path / "run"
    arguments = [*SEARCH, "--out", str(run), "--images", str(folder)]
    fails(arguments, "images", "does not exist")
    folder.mkdir()
    fails(arguments, "holds no images")
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    fails(arguments, "holds 3 images but 4 are needed")
    (folder / "broken.png").write_bytes(b"this is not an image")
    fails(arguments, "broken.png", "cannot be read")
    fails(["score", TOPOLOGY, *TINY, "--images", str(folder)], "broken.png")
    assert not (run / "trace.jsonl").exists()


def test_run_directory_of_another_configuration(fails, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*SEARCH, "--out", str(run)]) == 0
    before = contents(run)
    fails([*SEARCH, "--out", str(run), "--seed", "1"], "run", "seed")
    fails([*SCALE, "--out", str(run)], "search", "scale")
    assert contents(run) == before


def test_damaged_run_directory(fails, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*SEARCH, "--out", str(run)]) == 0
    (run / "config.json").write_text("{")
    before = contents(run)
    fails([*SEARCH, "--out", str(run)], "config.json")
    assert contents(run) == before | {"config.json": b"{"}


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_truncated_checkpoint(fails, tmp_path: Path, size: int) -> None:
    """Named however torch says it: without a file's beginning, directory, or content."""
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"weight": torch.zeros(10_000)}, whole)
    cut.write_bytes(whole.read_bytes()[:size])
    fails(["score", str(cut), *TINY], "cut.pth", "damaged")


def test_more_memory_than_there_is(fails) -> None:
    fails(["score", TOPOLOGY, *TINY, "--batch", "1e13"], "memory has run out", "smaller batches")


def test_impossible_budget(fails, tmp_path: Path) -> None:
    fails([*SEARCH, "--out", str(tmp_path / "run"), "--params", "1:2"], "budget")
    fails([*SEARCH, "--out", str(tmp_path / "run"), "--flops", "1T:"], "budget")
    fails([*SCALE, "--out", str(tmp_path / "run"), "--max-params", "10k"], "raise --max-params")
    assert not (tmp_path / "run" / "trace.jsonl").exists()


@pytest.mark.parametrize("folder", ["/proc/asvit_fast", "/dev/null/asvit_fast"])
def test_read_only_disk(fails, folder: str) -> None:
    """/proc takes no new folders, not even from root, and /dev/null is no folder."""
    fails([*SEARCH, "--out", folder], folder)
    fails([*SCALE, "--out", folder], folder)
    fails(["export", TOPOLOGY, "--to", folder], folder)


def test_files_where_folders_belong(fails, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    fails([*SEARCH, "--out", str(path)], "is a file")
    fails(["report", str(path)], "file")
    fails(["report", str(tmp_path)], "holds no run")
    fails(["export", TOPOLOGY, "--to", str(path)], "is a file")
    fails(["export", str(path), "--to", str(tmp_path / "model")], "not a checkpoint")
    assert contents(tmp_path) == {"file": b"precious"}


@pytest.mark.parametrize(
    "device", ["abacus", "cuda:99"] if torch.cuda.is_available() else ["abacus", "cuda", "cuda:99"]
)
def test_device(fails, device: str, tmp_path: Path) -> None:
    fails(["score", TOPOLOGY, *TINY, "--device", device], device.partition(":")[0])
    fails([*SEARCH, "--out", str(tmp_path / "run"), "--device", device], device.partition(":")[0])
    assert not (tmp_path / "run" / "trace.jsonl").exists()


def limited(arguments: list[str], file_size: int) -> subprocess.CompletedProcess[str]:
    """Run the program where no file can grow beyond ``file_size`` bytes, as on a disk that fills up."""
    return subprocess.run(
        [sys.executable, "-m", "asvit_fast", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size)),
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if line.startswith("asvit-fast: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_disk_fills_up_during_a_search(tmp_path: Path) -> None:
    """It stops with one line; with room again, the same command ends as if nothing had happened."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = [*SEARCH, "--steps", "40"]
    assert main([*command, "--out", str(whole)]) == 0
    trace = (whole / "trace.jsonl").stat().st_size
    state = (whole / "state.pt").stat().st_size
    assert trace > 1.5 * state, "the trace must be what hits the limit"
    error = one_line(limited([*command, "--out", str(stopped)], (trace + state) // 2))
    assert "trace.jsonl" in error
    assert str(stopped) in error
    done = read_jsonl(stopped / "trace.jsonl")
    assert 0 < len(done) < 40
    assert main([*command, "--out", str(stopped)]) == 0
    assert (stopped / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert [record["topology"] for record in read_jsonl(stopped / "trace.jsonl")][: len(done)] == [
        record["topology"] for record in done
    ]


@pytest.mark.slow
def test_full_disk_keeps_an_earlier_export(tmp_path: Path) -> None:
    target = tmp_path / "model"
    command = ["export", TOPOLOGY, "--to", str(target), "--img-size", "32", "--num-classes", "10"]
    assert main(command) == 0
    before = contents(target)
    one_line(limited([*command, "--seed", "1"], 10_000))
    assert contents(target) == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.slow
def test_full_disk_behind_stdout(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "asvit_fast", "search", "--print-config"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert "No space left" in one_line(done)


SMALL = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"


def small_model() -> af.models.AsViT:
    return af.create_model(SMALL, img_size=32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: af.accelerate(None), "model must be a torch.nn.Module"),
        (lambda: af.accelerate("swin_tiny_patch4_window7_224"), "timm.create_model"),
        (lambda: af.restore(None), "model must be a torch.nn.Module, got NoneType"),
        (lambda: af.search("a"), "space must be a SearchSpace"),
        (lambda: af.search(budget=(0, 1)), "budget must be a Budget"),
        (lambda: af.search(out=3), "out must name a folder, got 3"),
        (lambda: af.score(SMALL, batch=1), "batch must be 2 or more for ntk_condition"),
        (lambda: af.create_model(SMALL, num_classes=-1), "num_classes must be an integer of 0 or more, got -1"),
        (lambda: af.create_model(SMALL, num_classes=1.5), "num_classes"),
        (lambda: small_model().reset_classifier(-1), "num_classes"),
        (lambda: af.create_model(SMALL, in_chans=0), "in_chans must be an integer of 1 or more, got 0"),
        (lambda: af.create_model(SMALL, drop_path_rate=2.0), "drop_path_rate must be a number from 0 on and below 1"),
        (lambda: af.create_model(SMALL, drop_rate=float("nan")), "drop_rate must be a number"),
        (lambda: af.curve(torch.nn.Identity(), torch.zeros(0), torch.ones(3), torch.ones(3)), "theta must be [n]"),
        (lambda: af.ntk_gram(small_model(), None), "images must be a tensor"),
        (lambda: af.ntk_condition(None), "gram must be a Gram matrix"),
        (lambda: af.length_distortion(None), "c must be what curve(...) returns"),
        (lambda: af.curvature(None), "c must be what curve(...) returns"),
        (lambda: af.convert_asvit_state_dict(None), "state_dict must be a state dict"),
        (lambda: af.train(None, "."), "model must be"),
        (lambda: af.train(SMALL, None), "data must be"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(call, words):
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_curve_measures_need_no_two_images():
    score = af.score(SMALL, ("length_distortion",), img_size=32, thetas=2, repeats=1, batch=1)
    assert score["length_distortion"].mean > 0


def test_a_share_of_memory_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("ASVIT_FAST_MEMORY_SHARE", "half")
    with pytest.raises(InputError, match="ASVIT_FAST_MEMORY_SHARE must be a whole number, 0 for none, got 'half'"):
        af.tune_allocator()
