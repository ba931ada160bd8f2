"""``asvit-fast detect show``: what a trained detector finds in images, as PNG files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from tqdm import tqdm

from ..backends import resolve_device
from ..detection import load_detector
from ..detection.pictures import detect, draw, to_png
from ..errors import InputError
from ..files import write_atomic
from ..images import UnreadableImage, decode
from ..what import resolve
from .common import check_output_folder, print_on_main


def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    files = [Path(image) for image in values.images]
    for file in files:  # before any work
        if file.is_dir():
            raise InputError(f"image {str(file)!r} is a folder; give image files")
        if not file.is_file():
            raise InputError(f"image {str(file)!r} does not exist; give image files")
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_detector(resolve(values.checkpoint).trained, values.use_ema)
    device = resolve_device(values.device)
    model = loaded.model.to(device).eval()
    names = [name for _, name in loaded.categories]
    for file, target in zip(files, targets(files, out), strict=True):
        try:
            with Image.open(file) as image:
                pixels = decode(image, "RGB")
        except Exception as error:  # whatever Pillow raises
            raise UnreadableImage(str(file), error) from error
        found = detect(model, pixels, device, values.score)
        write_atomic(target, to_png(draw(pixels, found, names)))
        counts = Counter(names[label - 1] for label in found["labels"].tolist())
        text = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        tqdm.write(f"{target}: {text} of score {values.score:g} or more")
    print_on_main(f"{len(files)} pictures in {out}", values.quiet)
    return 0


def targets(files: list[Path], out: Path) -> list[Path]:
    """A PNG file for each image, with a number where names come twice."""
    seen: Counter[str] = Counter()
    found = []
    for file in files:
        seen[file.stem] += 1
        number = seen[file.stem]
        found.append(out / f"{file.stem}{f'_{number}' if number > 1 else ''}.png")
    return found
