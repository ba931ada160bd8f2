"""The command line: parsing, configuration files, and each command on tiny sizes."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import yaml

from asvit_fast.cli import COMMANDS, main
from asvit_fast.cli.options import bounds, choices_per_dimension, image_size, integer, limit, number
from asvit_fast.errors import InputError
from asvit_fast.export import export
from asvit_fast.files import from_json, read_jsonl
from asvit_fast.scoring import score
from asvit_fast.search import scale, search
from asvit_fast.topology import Topology
from asvit_fast.training import train

TOPOLOGY = "4,2,2|2,1,2|2,1,2|2,1,2|16"
UNITS = (
    *(
        "pixels",
        "number",
        "folder",
        "directory",
        "where",
        "part",
        "ratio",
        "probability",
        "strength",
        "alpha",
        "smoothing",
    ),
    *("smoothing", "rate", "decay", "factor", "norm", "epochs", "images", "updates", "passes", "processes", "seed"),
)
WORDS = (
    "NAME",
    "OWNER/NAME",
    "NAMES",
    "NAME=CHOICES",
    "NAME=VALUE",
    "TEXT",
    "FILE",
    "true|false",
)  # metavars that are no quantities
TINY = ["--img-size", "32", "--repeats", "1", "--thetas", "2", "--batch", "4", "--width", "16"]
SEARCH = ["search", "--steps", "3", *TINY, "--quiet"]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "asvit_fast", *arguments], capture_output=True, text=True, check=False)


# Reading values


@pytest.mark.parametrize(
    ("text", "value"), [("1e6", 10**6), ("5M", 5 * 10**6), ("2.5G", 25 * 10**8), ("100m", 10**8), ("0.5", 0.5), (7, 7)]
)
def test_number(text: str, value: float) -> None:
    assert number(text) == value
    assert isinstance(number(text), type(value))


@pytest.mark.parametrize("text", ["", "M", "5X", "-1", "nan", "inf", None, True, [1]])
def test_not_a_number(text: object) -> None:
    with pytest.raises(InputError, match="expected a number"):
        number(text)


def test_bounds_and_limits() -> None:
    assert bounds("1M:10M") == (10**6, 10**7)
    assert bounds(":10M") == (None, 10**7)
    assert bounds("1M:") == (10**6, None)
    assert bounds([None, "5M"]) == (None, 5 * 10**6)
    assert limit("100M") == 10**8
    assert limit("80M:110M") == (80 * 10**6, 110 * 10**6)
    for wrong in ("10M", "1M:2M:3M", "2M:1M"):
        with pytest.raises(InputError):
            bounds(wrong)
    with pytest.raises(InputError):
        limit(":5M")


def test_other_readers() -> None:
    assert image_size("224") == 224
    assert image_size("224x160") == image_size([224, 160]) == (224, 160)
    assert choices_per_dimension(["K1=8", "heads=16,32"]) == {"K1": (8,), "heads": (16, 32)}
    assert choices_per_dimension({"K1": 8, "heads": [16, 32]}) == {"K1": (8,), "heads": (16, 32)}
    for read, wrong in ((image_size, "0"), (image_size, "1x2x3"), (choices_per_dimension, ["K1"]), (integer(1), "1.5")):
        with pytest.raises(InputError):
            read(wrong)


# Help, defaults, configuration


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        ["serach"],
        ["score", "--metricx", "ntk"],
        ["score", "--metrics", "speed"],
        ["search", "--print-config"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_answer_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, 'numpy' in sys.modules))\n"
        "from asvit_fast.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_answers_at_once(arguments: list[str]) -> None:
    """A tenth of a second of work; the limits leave room for a machine that is busy."""
    wall, work = [], []
    for _ in range(3):
        started, before = time.perf_counter(), os.times()
        assert program(*arguments).returncode == 0
        after = os.times()
        wall.append(time.perf_counter() - started)
        work.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(work) < 0.5
    assert min(wall) < 3


def test_whole_numbers_are_read_exactly() -> None:
    assert number("9007199254740993") == 2**53 + 1
    assert number(2**53 + 1) == 2**53 + 1


@pytest.mark.parametrize("module", ["asvit_fast.cli.options", "numpy.linalg", "torch.nn.modules", "timm.layers"])
def test_interrupt_while_loading(module: str) -> None:
    """Ctrl-C before the work has begun: no traceback, whatever is being imported (``-X importtime`` tells)."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "asvit_fast", "score", TOPOLOGY, *TINY[:-2], "--repeats", "10000"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(f" {module}"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error, error
    assert process.returncode == 130


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for option in COMMANDS[command].options:
        assert option.label in shown
        assert len(option.help) > 10
        if not (option.positional or option.flag):
            assert any(word in option.help for word in UNITS) or option.metavar in WORDS, f"{option.label} needs a unit"


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("score", score),
        ("search", search),
        ("scale", scale),
        ("export", export),
        ("train", train),
    ],
)
def test_defaults_are_those_of_the_functions(command: str, function) -> None:
    parameters = inspect.signature(function).parameters
    compared = 0
    for option in COMMANDS[command].options:
        if option.name in parameters and option.name not in ("out", "space") and not option.positional:
            default = parameters[option.name].default
            if default is not inspect.Parameter.empty:
                assert option.default == default, option.name
                compared += 1
    assert compared >= 3


def test_config_file_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("steps: 7\nimg-size: 64\nspace: {K1: 8}\nparams: ':5M'\nlr: 1e-2\n")
    assert main(["search", "--config", str(config), "--steps", "9", "--print-config"]) == 0
    effective = yaml.safe_load(capsys.readouterr().out)
    assert effective["steps"] == 9
    assert effective["img_size"] == 64
    assert effective["repeats"] == 5
    assert effective["space"] == {"K1": [8]}
    assert effective["params"] == [None, 5_000_000]
    assert effective["lr"] == 0.01


@pytest.mark.parametrize("command", COMMANDS)
def test_printed_config_is_a_config(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--space", "K1=4,8", "--flops", "1M:"] if command == "search" else []
    assert main([command, *extra, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(printed)
    assert main([command, "--config", str(tmp_path / "config.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 3", "'stepz' (did you mean 'steps'?)"),
        ("steps: many", "steps: expected a number"),
        ("- steps", "must hold"),
        ("a: [", "is not YAML"),
        ("quiet: 3", "quiet: expected true or false"),
    ],
)
def test_bad_config(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert main(["search", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# The commands


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_env_require(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["env", "--require", "cuda"]) == (0 if torch.cuda.is_available() else 1)
    assert main(["env", "--require", "cpu"]) in (0, 1)
    assert main(["env", "--require", "abacus"]) == 2


def test_score_json_is_strict_and_alone_on_stdout() -> None:
    done = program("score", TOPOLOGY, "--json", *TINY[:-2])
    assert done.returncode == 0, done.stderr
    scores = from_json(done.stdout)  # refuses NaN and Infinity
    assert set(scores["metrics"]) == {"length_distortion", "curvature", "ntk_condition"}
    settings = scores["settings"]
    assert (settings["seed"], settings["images"], settings["device"]) == (0, None, "cpu")
    assert {"img_size", "thetas", "repeats", "batch", "convention", "norms", "metrics"} <= set(settings)


def test_score_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", TOPOLOGY, "--metrics", "ntk_condition", *TINY[:-2]]) == 0
    shown = capsys.readouterr().out
    assert "ntk_condition" in shown
    assert "±" in shown
    assert "smaller is better" in shown
    assert "curvature" not in shown


def test_search_scale_report_export(tmp_path: Path) -> None:
    """The main job through real processes."""
    run, grown, model = (str(tmp_path / name) for name in ("search", "scale", "model"))
    found = program(*SEARCH, "--out", run, "--space", "K1=4,5", "--max-params", "3M")
    assert found.returncode == 0, found.stderr
    topology = Topology.parse(found.stdout.strip())  # --quiet: the topology is all there is
    assert topology.stages[0].kernel in (4, 5)
    assert len(read_jsonl(tmp_path / "search" / "trace.jsonl")) == 3

    scaled = program("scale", str(topology), "--out", grown, "--max-steps", "1", *TINY[:-2])
    assert scaled.returncode == 0, scaled.stderr
    assert f"asvit-fast export {grown}" in scaled.stdout

    page = program("report", str(tmp_path))
    assert page.returncode == 0, page.stderr
    assert Path(page.stdout.strip()).is_file()
    assert len(list(tmp_path.glob("*.png"))) == 5

    exported = program("export", grown, "--to", model, "--img-size", "32", "--num-classes", "10")
    assert exported.returncode == 0, exported.stderr
    assert timm.create_model(f"local-dir:{model}", pretrained=True).num_classes == 10


def test_search_says_what_it_does_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SEARCH[:-1], "--out", str(tmp_path / "run")]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "4,556,250 topologies" in first.out
    assert "Writing to" in first.err
    assert "asvit-fast scale" in first.out
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main(command) == 0
    second = capsys.readouterr()
    assert "run of 3 steps: continuing" in second.err
    assert first.out == second.out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_a_terminal_without_letters_gets_the_result() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [
        sys.executable,
        "-m",
        "asvit_fast",
        "score",
        "4,2,2|2,1,2|3,1,2|2,1,2|8",
        "--img-size",
        "32",
        "--repeats",
        "1",
        "--batch",
        "2",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "length_distortion" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C or a preemption in the middle of a search: its exit code, a line a step so far, and the same command goes
    on."""
    command = [*SEARCH[:-1], "--steps", "200", "--out", str(tmp_path)]
    trace = tmp_path / "trace.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "asvit_fast", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit to ignore it
    )
    while process.poll() is None and not (trace.exists() and trace.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert ("interrupted" if code == 130 else "terminated") + "; the same command continues" in error
    done = read_jsonl(trace)
    assert 0 < len(done) < 200
    steps = [line for line in error.splitlines() if line.startswith("search: ")]
    assert len(done) - 1 <= len(steps) <= len(done)
    assert re.fullmatch(r"search: 1/200 steps, length \S+, ntk \S+, reward \S+, entropy \S+, .* left", steps[0])
    assert "\r" not in error and "%|" not in error
    assert main([*command, "--quiet"]) == 0
    assert read_jsonl(trace)[: len(done) - 1] == done[:-1]  # a step whose state was not saved yet is done again
    assert len(read_jsonl(trace)) == 200
