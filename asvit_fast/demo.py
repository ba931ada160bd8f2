"""The main job on real images, in a few minutes on a CPU: ``make demo``, or ``python -m asvit_fast.demo``.

Photographs that scikit-image and scikit-learn ship, and scikit-learn's handwritten digits, stand in for a data set.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from .cli.common import amount, table
from .errors import InputError
from .export import export
from .report import report
from .scoring import Score, score
from .search import scale, search
from .topology import SearchSpace, Topology
from .training import train

IMG_SIZE = 64  # pixels
SEARCH_STEPS = 60
REPEATS = 2  # initialisations per topology while searching; the comparison at the end takes five
COMPARE_REPEATS = 5
MAX_PARAMS = 8_000_000
SEED = 0
BATCH = 16
EPOCHS = 10  # of training
SCHEDULE = "0.4:4,0.2:2,0.4:1"
KEPT_OUT = 355  # digits
SCORES = ("length_distortion", "ntk_condition")

# fmt: off
PHOTOGRAPHS = (  # of scikit-image; those that a version does not ship are left out
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "page.png", "retina.jpg", "rocket.jpg", "text.png",
)
# fmt: on


def main(argv: list[str] | None = None) -> int:
    """Run the demo in ``--out``; a second run continues, or shows again, what is there."""
    parser = argparse.ArgumentParser(prog="python -m asvit_fast.demo", description=__doc__)
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder for everything (default: %(default)s)"
    )
    try:
        run(Path(parser.parse_args(argv).out))
    except (InputError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def run(out: Path) -> None:
    """All steps, each announced in plain words."""
    started = time.perf_counter()
    images = out / "images"
    count = write_images(images)
    print(f"1. Images: {count} crops of photographs and handwritten digits in {images}.\n")

    seed_topology = run_search(out / "search", images)
    final = run_scale(seed_topology, out / "scale", images)
    compare(seed_topology, images)

    run_training(seed_topology, out / "train", write_digits(out / "digits"))

    page = report(out)
    model_folder = export(out / "train", out / "model")
    print(f"6. Export: {model_folder} holds the trained network for timm. {check_export(model_folder)}\n")

    print(f"Done in {time.perf_counter() - started:.0f} s. The search found {seed_topology}, which grew to {final}.")
    print(f"Read      {page}")
    print(f"Load      timm.create_model('local-dir:{model_folder}', pretrained=True)   after   import asvit_fast")
    print(
        "Remember  the scores order untrained networks; a search and a training this short, at this image size, show "
        "how the tool works\n          and prove nothing about accuracy. For that: asvit-fast search --help"
    )


def run_search(out: Path, images: Path) -> Topology:
    space = SearchSpace()
    print(
        f"2. Search: {SEARCH_STEPS} of {space.size:,} topologies are sampled and scored at {IMG_SIZE}x{IMG_SIZE} "
        f"pixels, each with {REPEATS} random initialisations; the policy learns which choices score well."
    )
    found = search(
        space=space, steps=SEARCH_STEPS, images=images, seed=SEED, out=out,
        img_size=IMG_SIZE, repeats=REPEATS, batch=BATCH, progress=True,
    )  # fmt: skip
    print(
        f"   Its most probable topology is now {found.topology}: {amount(found.params)} parameters, "
        f"{amount(found.flops)} multiply-adds.\n"
        f"   The policy's entropy went from {space.entropy:.2f} to {found.entropy:.2f} nats.\n"
    )
    return found.topology


def run_scale(seed_topology: Topology, out: Path, images: Path) -> Topology:
    print(
        f"3. Scaling: {seed_topology} grows in depth and width while it stays within {amount(MAX_PARAMS)} parameters."
    )
    steps = scale(
        seed_topology, max_params=MAX_PARAMS, images=images, seed=SEED, out=out,
        img_size=IMG_SIZE, repeats=REPEATS, batch=BATCH, progress=True,
    )  # fmt: skip
    rows: list[tuple[object, ...]] = [("step", "topology", "parameters", "multiply-adds")]
    rows += [(step.step, str(step.topology), amount(step.params), amount(step.flops)) for step in steps]
    print(table(rows, indent="   ") + "\n")
    return steps[-1].topology


def compare(found: Topology, images: Path) -> None:
    random = SearchSpace().sample(torch.Generator().manual_seed(SEED))
    print(f"4. Scores of the found topology beside a random one's, {COMPARE_REPEATS} initialisations each:")
    rows: list[tuple[str, ...]] = [("", "found", "random", "")]
    scores = [
        score(topology, SCORES, img_size=IMG_SIZE, repeats=COMPARE_REPEATS, batch=BATCH, images=images, seed=SEED)
        for topology in (found, random)
    ]
    for metric, direction in zip(SCORES, ("larger is better", "smaller is better"), strict=True):
        rows.append((metric.replace("_", " "), *(_value(one, metric) for one in scores), direction))
    length, condition = (scores[0][metric].mean / scores[1][metric].mean for metric in SCORES)
    print(
        f"   random: {random}\n{table(rows, indent='   ')}\n"
        f"   The found one stretches a circle of images {length:.2g} times as much as the random one (more is better); "
        f"its NTK\n   condition number is {condition:.2g} times the random one's (less is better).\n"
    )


def run_training(topology: Topology, out: Path, digits: Path) -> None:
    print(
        f"5. Training: the found topology learns handwritten digits in {EPOCHS} epochs, coarse tokens first: 4 and "
        "then 2\n   times fewer tokens per side, with the same weights."
    )
    result = train(
        topology, digits, schedule=SCHEDULE, epochs=EPOCHS, out=out, img_size=IMG_SIZE, batch_size=64, lr=2e-3,
        no_aug=True, mixup=0.0, cutmix=0.0, drop_path=0.0, model_ema=False, workers=0, seed=SEED,
    )  # fmt: skip
    print(
        f"   {result.top1:.1f} % of the {KEPT_OUT} digits that it has not seen are recognised, after "
        f"{result.seconds:.0f} s of training steps;\n   the coarse phases saved {result.cost.saving:.0%} of the "
        "multiply-adds of full tokens throughout.\n"
    )


def _value(scores: Score, metric: str) -> str:
    return f"{scores[metric].mean:.4g} ± {scores[metric].std:.2g}"


def check_export(folder: Path) -> str:
    """Load the export the way any user of timm would and put an image through."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(1, 3, IMG_SIZE, IMG_SIZE))  # [1, 1000]
    return (
        f"timm loads it and it answers with {logits.shape[1]} finite logits." if bool(logits.isfinite().all()) else ""
    )


def write_images(folder: Path) -> int:
    """Write the crops as PNG files, once; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    digits = ((f"digit_{number}.png", pixels) for number, pixels in _digits(8))
    for name, pixels in (*_photographs(), *digits):
        names.append(name)
        if not (folder / name).exists():
            scratch = folder / f".{name}"
            Image.fromarray(pixels).resize((2 * IMG_SIZE, 2 * IMG_SIZE), Image.Resampling.BICUBIC).save(scratch, "PNG")
            scratch.replace(folder / name)
    return len(names)


def write_digits(folder: Path) -> Path:
    """scikit-learn's handwritten digits as image files: every 5th of each class is kept out for validation, once."""
    if (folder / "val").is_dir():
        return folder
    scratch = folder.with_name(f".{folder.name}")
    seen: Counter[int] = Counter()
    for number, pixels in _digits(None):
        seen[number] += 1
        split = "val" if seen[number] % 5 == 0 else "train"
        path = scratch / split / str(number) / f"{seen[number]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).save(path)
    scratch.replace(folder)
    return folder


def _photographs() -> Iterator[tuple[str, np.ndarray]]:
    """The two square halves of every photograph on disk: name, uint8 [side, side, 3]."""
    try:
        import skimage
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise InputError(
            f"the demo's images come with scikit-image and scikit-learn ({error}); pip install both"
        ) from None
    folder = Path(skimage.__file__).parent / "data"
    samples = load_sample_images()
    photographs = [(Path(name).stem, pixels) for name, pixels in zip(samples.filenames, samples.images, strict=True)]
    for name in PHOTOGRAPHS:
        if (folder / name).is_file():
            with Image.open(folder / name) as image:
                photographs.append((Path(name).stem, np.asarray(image.convert("RGB"))))
    for name, pixels in photographs:  # pixels: [height, width, 3]
        side = min(pixels.shape[:2]) * 3 // 4
        yield f"photograph_{name}_1.png", pixels[:side, :side]
        yield f"photograph_{name}_2.png", pixels[-side:, -side:]


def _digits(count: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """The first ``count`` handwritten digits, or all: number, uint8 [8, 8, 3]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for image, number in zip(digits.images[:count], digits.target[:count], strict=True):
        grey = (image * (255 / 16)).astype(np.uint8)  # [8, 8]
        yield int(number), np.repeat(grey[:, :, None], 3, axis=2)


if __name__ == "__main__":
    raise SystemExit(main())
