"""The main job on real images, in a few minutes on a CPU: ``make demo``, or ``python -m asvit_fast.demo``.

Photographs that scikit-image and scikit-learn ship, and scikit-learn's handwritten digits, stand in for a data set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import TensorDataset

from .cli.common import amount, table
from .errors import InputError
from .export import export
from .report import report
from .scoring import Score, score
from .scoring.score import Measure
from .search import SearchResult, scale, search
from .topology import SearchSpace, Topology
from .training import train

IMG_SIZE = 64  # pixels
SEARCH_STEPS = 100
REPEATS = 1  # initialisations per topology while searching; the comparison takes more
COMPARE_REPEATS = 8
COMPARE_SEED = 1000  # other weights and circles than those that the search chose by
MAX_PARAMS = 8_000_000
SEED = 0
BATCH = 16
EPOCHS = 24  # of the training with coarse tokens first
SCHEDULE = "10:4,6:2,8:1"
RECIPE: dict[str, Any] = {
    "img_size": IMG_SIZE, "batch_size": 64, "lr": 2e-3, "warmup_epochs": 2, "no_aug": True, "crop_pct": 1.0,
    "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "model_ema": False, "workers": 0, "seed": SEED,
}  # fmt: skip
KEPT_OUT = 3  # every 3rd digit
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

    found = run_search(out / "search", images)
    compare(found, images)
    seed_topology = found.topology
    final = run_scale(seed_topology, out / "scale", images)
    digits = load_digits()
    run_training(seed_topology, digits, out)

    page = report(out)
    model_folder = export(out / "train", out / "model")
    print(f"6. Export: {model_folder} holds the trained network for timm. {check_export(model_folder, digits[1])}\n")

    print(f"Done in {time.perf_counter() - started:.0f} s. The search found {seed_topology}, which grew to {final}.")
    print(f"Read      {page}")
    print(f"Load      timm.create_model('local-dir:{model_folder}', pretrained=True)   after   import asvit_fast")
    print(
        "Remember  the scores order untrained networks; a search and trainings this short, at this image size, show "
        "how the tool works\n          and prove little about accuracy. For that: asvit-fast search --help"
    )


def run_search(out: Path, images: Path) -> SearchResult:
    space = SearchSpace()
    print(
        f"2. Search: {SEARCH_STEPS} of {space.size:,} topologies are sampled and scored at {IMG_SIZE}x{IMG_SIZE} "
        "pixels, the policy learns\n   which choices score well; then as many are drawn at random and scored alike."
    )
    found = search(
        space=space, steps=SEARCH_STEPS, images=images, seed=SEED, out=out,
        img_size=IMG_SIZE, repeats=REPEATS, batch=BATCH, progress=True, baseline="random",
    )  # fmt: skip
    assert found.baseline is not None
    last = SEARCH_STEPS // 4
    rows = [("mean of", "length distortion", "NTK condition number")]
    for name, trace in (
        (f"{SEARCH_STEPS} random topologies", found.baseline.trace),
        (f"the first {last} that the policy sampled", found.trace[:last]),
        (f"the last {last} that it sampled", found.trace[-last:]),
    ):
        length, condition = ([record[metric] for record in trace] for metric in SCORES)
        rows.append((name, f"{statistics.fmean(length):.3g}", f"{statistics.geometric_mean(condition):.3g}"))
    print(
        f"{table(rows, indent='   ')}\n   More length distortion is better, and a smaller condition number. "
        f"The policy's entropy went from {space.entropy:.2f} to {found.entropy:.2f} nats.\n"
    )
    return found


def compare(found: SearchResult, images: Path) -> None:
    assert found.baseline is not None
    candidates = {
        "most probable of the policy": found.most_probable,
        f"best of the {SEARCH_STEPS} that it sampled": found.best_sampled,
        f"best of the {SEARCH_STEPS} random ones": found.baseline.best,
    }
    print(
        f"3. Compare: the best of many noisy scores is partly luck. So the winners are scored again, each as "
        f"{COMPARE_REPEATS} new networks:"
    )
    rows: list[tuple[str, ...]] = [("", *SCORES, "topology")]
    fresh: dict[str, Score] = {}
    for name, candidate in candidates.items():
        if candidate is None:
            continue
        topology = candidate.topology
        fresh[name] = score(
            topology, SCORES, img_size=IMG_SIZE, repeats=COMPARE_REPEATS, batch=BATCH, images=images, seed=COMPARE_SEED
        )
        rows.append((name, *(_value(fresh[name], metric) for metric in SCORES), topology.seed_string))
    print(table(rows, indent="   "))
    probable, *_, random = fresh.values()
    for metric, larger in zip(SCORES, (True, False), strict=True):
        print(f"   {metric.replace('_', ' ')}: {_verdict(probable[metric], random[metric], larger)}")
    print()


def _verdict(found: Measure, random: Measure, larger: bool) -> str:
    """What Welch's test says of two sets of networks."""
    from scipy.stats import ttest_ind

    chance = float(ttest_ind(found.values, random.values, equal_var=False).pvalue)
    better = (found.mean > random.mean) is larger
    if chance > 0.05:
        return f"the found topology and the best random one do not differ clearly (p = {chance:.2g})"
    return f"the {'found topology' if better else 'best random one'} is better (p = {chance:.2g})"


def run_scale(seed_topology: Topology, out: Path, images: Path) -> Topology:
    print(
        f"4. Scaling: {seed_topology} grows in depth and width while it stays within {amount(MAX_PARAMS)} parameters."
    )
    steps = scale(
        seed_topology, max_params=MAX_PARAMS, images=images, seed=SEED, out=out,
        img_size=IMG_SIZE, repeats=REPEATS, batch=BATCH, progress=True,
    )  # fmt: skip
    rows: list[tuple[object, ...]] = [("step", "topology", "parameters", "multiply-adds")]
    rows += [(step.step, str(step.topology), amount(step.params), amount(step.flops)) for step in steps]
    print(table(rows, indent="   ") + "\n")
    return steps[-1].topology


def run_training(topology: Topology, digits: tuple[TensorDataset, TensorDataset], out: Path) -> None:
    print(
        f"5. Training: the found topology learns handwritten digits, coarse tokens first ({SCHEDULE}: epochs:reduction "
        "per side),\n   and once more with all tokens throughout, for as many epochs as fit into the same time."
    )
    coarse = train(topology, digits, schedule=SCHEDULE, epochs=EPOCHS, out=out / "train", **RECIPE)
    full_epoch = statistics.median(row["train_seconds"] for row in coarse.epochs if row["token_reduction"] == 1)
    epochs = max(1, round(coarse.seconds / full_epoch))
    full = train(topology, digits, schedule="1", epochs=epochs, out=out / "train_full_tokens", **RECIPE)
    rows = [("", "epochs", "seconds", "top-1, all tokens")]
    for name, result in (("coarse tokens first", coarse), ("all tokens throughout", full)):
        rows.append((name, str(len(result.epochs)), f"{result.seconds:.1f}", f"{result.top1:.1f} %"))
    print(f"{table(rows, indent='   ')}\n   of the {len(digits[1])} digits that neither has seen.\n")


def _value(scores: Score, metric: str) -> str:
    return f"{scores[metric].mean:.4g} ± {scores[metric].std:.2g}"


def check_export(folder: Path, kept_out: TensorDataset) -> str:
    """Load the export the way any user of timm would, and give it the digits that training has not seen."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, targets = kept_out.tensors  # [n, 3, IMG_SIZE, IMG_SIZE], [n]
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(1) for part in images.split(RECIPE["batch_size"])])  # [n]
    return f"timm loads it, and it has {100 * float((answers == targets).float().mean()):.1f} % of these digits right."


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


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits, enlarged from 8 x 8, for training and (every KEPT_OUT-th of each class) for
    validation: images float32 [n, 3, IMG_SIZE, IMG_SIZE], normalised as our networks expect, and targets int64 [n]."""
    pixels = torch.from_numpy(np.stack([image for _, image in _digits(None)]))  # uint8 [1797, 8, 8, 3]
    targets = torch.tensor([number for number, _ in _digits(None)])  # [1797]
    images = F.interpolate(pixels.permute(0, 3, 1, 2) / 255, (IMG_SIZE, IMG_SIZE), mode="bicubic")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    images = (images - mean) / std
    within_class = F.one_hot(targets).cumsum(0).gather(1, targets.unsqueeze(1)).squeeze(1)  # [1797], from 1
    kept_out = within_class % KEPT_OUT == 0
    return TensorDataset(images[~kept_out], targets[~kept_out]), TensorDataset(images[kept_out], targets[kept_out])


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
    from sklearn import datasets

    digits = datasets.load_digits()
    for image, number in zip(digits.images[:count], digits.target[:count], strict=True):
        grey = (image * (255 / 16)).astype(np.uint8)  # [8, 8]
        yield int(number), np.repeat(grey[:, :, None], 3, axis=2)


if __name__ == "__main__":
    raise SystemExit(main())
