"""Names, summaries and options of the commands. The work is in the modules of their names."""

from __future__ import annotations

from ..settings import EXPORT_FORMATS, ScaleSettings, SearchSettings, TuneSettings
from .common import DEVICE, IMG_SIZE, METRICS, QUIET, SCORING, WHAT
from .eval import COMMAND as EVAL
from .options import (
    Command,
    Option,
    bounds,
    choice,
    choices_per_dimension,
    flag,
    image_size,
    integer,
    number,
    options_of,
    seed,
    text,
)
from .train import COMMAND as TRAIN

OUT = Option("out", text, None, "run directory, made or continued", "DIR", required=True)
JSON = Option("json", flag, False, "print strict JSON and nothing else", flag=True)


def _what(name: str, help: str = WHAT) -> Option:
    return Option(name, text, None, help, positional=True, required=True)


ENV = Command(
    name="env",
    summary="Print versions, the build report, and every op with every backend: available, or the reason it is not.",
    options=(
        Option("json", flag, False, "print strict JSON on stdout", flag=True),
        Option("require", text, None, "exit with 1 unless this backend can run: cuda, triton, cpu, ...", "NAME"),
    ),
    epilog="example: asvit-fast env --require cuda && asvit-fast search ...",
)

SCORE = Command(
    name="score",
    summary="Score a network without training it: length distortion, curvature, NTK condition number.",
    options=(_what("what"), METRICS, *SCORING, JSON),
    epilog="example: asvit-fast score '8,2,3|4,1,2|4,1,4|4,1,6|32' --img-size 224 --repeats 5",
)

SEARCH = Command(
    name="search",
    summary="Find a seed topology without training, by policy gradient on the scores.",
    options=(
        OUT,
        *options_of(SearchSettings),
        *SCORING,
        Option("params", bounds, None, "window of the number of parameters: LOW:HIGH, :10M or 1M:", "LO:HI"),
        Option("flops", bounds, None, "window of the number of multiply-adds per image: LOW:HIGH, :1G or 1M:", "LO:HI"),
        Option("max_params", number, None, "largest number of parameters: the high end of --params", "NUMBER"),
        Option(
            "space",
            choices_per_dimension,
            {},
            "narrow a dimension (K1..K4, S1..S3, E1..E4, heads): --space K1=8 --space heads=16,32; may be repeated",
            "NAME=CHOICES",
            repeated=True,
        ),
        Option(
            "baseline",
            choice("random"),
            None,
            "random = also score as many topologies drawn uniformly, for comparison; a finished run may add them",
            "NAME",
        ),
        QUIET,
    ),
    epilog="example: asvit-fast search --out runs/search --images photos/ --steps 500",
    resumable=True,
)

SCALE = Command(
    name="scale",
    summary="Grow a topology in depth and width without training, up to a number of parameters.",
    options=(
        _what("topology", f"what has the topology to start from: {WHAT}"),
        OUT,
        *options_of(ScaleSettings),
        *SCORING,
        QUIET,
    ),
    epilog="example: asvit-fast scale '8,2,3|4,1,2|4,1,4|4,1,6|32' --out runs/scale --max-params 30M",
    resumable=True,
)

REPORT = Command(
    name="report",
    summary="Draw a run: PNG plots and one self-contained report.html inside its directory; prints the page's path.",
    options=(
        _what(
            "directory", "run directory of search, scale or train, or one that holds them as search/, scale/ and train/"
        ),
    ),
    epilog="example: asvit-fast report runs/search",
)

EXPORT = Command(
    name="export",
    summary="Write a topology or a trained network for timm.create_model('local-dir:...'), ONNX or torch.export.",
    options=(
        _what("source"),
        Option("to", text, None, "folder to write, new or empty or an earlier export", "DIR", required=True),
        Option("format", choice(*EXPORT_FORMATS), "timm", f"one of {', '.join(EXPORT_FORMATS)}", "NAME"),
        Option("seed", seed, 0, "seed (a whole number) of fresh weights", "N"),
        Option(
            "num_classes", integer(0), None, "number of outputs, 0 = none; without it the training's, else 1000", "N"
        ),
        Option(
            "img_size",
            image_size,
            None,
            "image size in pixels: a side, or HEIGHTxWIDTH; without it the run's, else 224",
            "PIXELS",
        ),
        Option("use_ema", flag, False, "of a training, the moving average of the weights", flag=True),
    ),
    epilog="example: asvit-fast export runs/scale --to model\n"
    "         asvit-fast export runs/train --to model --format onnx",
)

TUNE = Command(
    name="tune",
    summary="Refine the tiles of Triton kernels for the GPU at hand; models never tune anything themselves.",
    options=(
        *options_of(TuneSettings),
        IMG_SIZE,
        DEVICE,
        Option("again", flag, False, "tune what the table already has, too", flag=True),
        Option("dry_run", flag, False, "list what would be tuned, and stop; needs no GPU", flag=True),
        QUIET,
    ),
    epilog="example: asvit-fast tune --dtypes bf16 --topology '8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88'\n"
    "The table is in the user's cache folder, or in the folder that ASVIT_FAST_TILES names.",
    resumable=True,
)

COMMANDS = {command.name: command for command in (ENV, SCORE, SEARCH, SCALE, TRAIN, EVAL, REPORT, EXPORT, TUNE)}
