"""Options and small helpers that several commands share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from ..errors import InputError
from ..files import folder_path
from ..settings import ImageSize, ScoreSettings, image_sides
from .options import Option, flag, options_of, seed, text

WHAT = (
    "topology, name of a model of timm or torchvision (asvit_small), run directory of search, scale or train, exported "
    "folder, or checkpoint"
)
_SCORE = {option.name: option for option in options_of(ScoreSettings)}
METRICS, IMG_SIZE, DEVICE = (_SCORE.pop(name) for name in ("metrics", "img_size", "device"))
IMAGES = Option("images", text, None, "folder of images for the NTK; without it, normal noise from the seed", "DIR")
SEED = Option("seed", seed, 0, "seed (a whole number) of everything that is drawn", "N")
QUIET = Option("quiet", flag, False, "no progress bar and no explanations, only the result", flag=True)
CIRCLE = (_SCORE["thetas"], _SCORE["batch"])
SCORING = (IMG_SIZE, *_SCORE.values(), IMAGES, SEED, DEVICE)


def check_output_folder(directory: str) -> None:
    """Raise InputError when ``directory`` is a file or no name; the folder itself is made by whoever writes first."""
    path = folder_path(directory, "--out")
    if path.exists() and not path.is_dir():
        raise InputError(f"{directory!r} is a file; give a folder")


def is_main_process() -> bool:
    """Whether this process speaks for all; under torchrun one rank does."""
    return os.environ.get("RANK", "0") == "0"


def print_on_main(line: str = "", quiet: bool = False) -> None:
    if not quiet and is_main_process():
        print(line, flush=True)


def table(rows: Iterable[Sequence[Any]], indent: str = "  ") -> str:
    """Rows of text in columns: the first column flush left, the others flush right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join((indent + "  ".join(row)).rstrip() for row in aligned)


def format_count(value: float) -> str:
    """A count for people: 2.32 M, 491.0 M, 5.13 G."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {suffix}"
    return f"{value:g}"


def initialisations(repeats: int) -> str:
    return "1 initialisation" if repeats == 1 else f"{repeats} initialisations"


def size_text(img_size: ImageSize) -> str:
    return "x".join(map(str, image_sides(img_size)))


def source_text(images: str | None) -> str:
    return f"images of {images}" if images else "normal noise instead of images"


def scoring_text(values: SimpleNamespace) -> str:
    """The scoring of a run's candidates in words."""
    return (
        f"{initialisations(values.repeats)} at {size_text(values.img_size)} pixels on {source_text(values.images)}; "
        f"{values.convention} convention, seed {values.seed}"
    )
