"""The main job on real images, in a few minutes on a CPU: ``make demo``, or ``python -m asvit_fast.demo``.

Photographs that scikit-image and scikit-learn ship stand in for a data set.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import TensorDataset

from .cli.common import format_count, table
from .errors import EXIT_INPUT, EXIT_INTERRUPTED, InputError
from .export import export
from .report import report
from .scoring import Score, score
from .scoring.score import Measure
from .search import SearchResult, scale, search
from .topology import SearchSpace, Topology
from .training import train
from .training.checkpoint import LAST

IMG_SIZE = 64  # pixels
SEARCH_STEPS = 100
REPEATS = 1  # initialisations per topology while searching; the comparison takes more
COMPARE_REPEATS = 8
COMPARE_SEED = 1000  # other weights and circles than those that the search chose by
MAX_PARAMS = 8_000_000
SEED = 0
BATCH = 16
EPOCHS = 14  # of the training with coarse tokens first
SCHEDULE = "8:4,3:2,3:1"
RECIPE: dict[str, Any] = {
    "img_size": IMG_SIZE, "batch_size": 64, "lr": 2e-3, "warmup_epochs": 2, "no_aug": True, "crop_pct": 1.0,
    "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "model_ema": False, "workers": 0, "seed": SEED,
}  # fmt: skip
PATCHES = {"training": 100, "validation": 30}  # of each photograph
PATCH_SIDE = (48, 144)  # pixels of a photograph, from and to
BORDER = 0.7  # of a photograph's width: patches for training are left of it, those for validation right
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
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command continues where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run(out: Path) -> None:
    """All steps, each announced in plain words."""
    started = time.perf_counter()
    images = out / "images"
    count = write_images(images)
    print(f"1. Images: {count} crops of photographs in {images}.\n")

    found = run_search(out / "search", images)
    compare(found, images)
    seed_topology = found.topology
    final = run_scale(seed_topology, out / "scale", images)
    patches = make_patches("training"), make_patches("validation")
    run_training(seed_topology, patches, out)

    page = report(out)
    model_folder = export(out / "train" / LAST, out / "model")
    print(f"6. Export: {model_folder} holds the trained network for timm. {check_export(model_folder, patches[1])}\n")

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
    typical = statistics.median(record[SCORES[0]] for record in found.trace[-last:])
    reach = sum(record[SCORES[0]] >= typical for record in found.baseline.trace)
    print(
        f"{table(rows, indent='   ')}\n   More length distortion is better, and a smaller condition number. "
        f"The policy's entropy went from {space.entropy:.2f} to {found.entropy:.2f} nats.\n"
        f"   Half of the last {last} have a length distortion of {typical:.3g} or more: {reach} of the "
        f"{SEARCH_STEPS} random ones do.\n"
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
        "3. Compare: the best of many noisy scores is partly luck. So the winners are scored again, each as "
        f"{COMPARE_REPEATS} new\n   networks. The best of many random ones is hard to beat; the policy has learnt "
        "where such ones are."
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
        measures = [fresh[name][metric] for metric in SCORES]
        rows.append((name, *(f"{one.mean:.4g} ± {one.std:.2g}" for one in measures), topology.seed_string))
    print(table(rows, indent="   "))
    probable, *_, random = fresh.values()
    for metric, larger in zip(SCORES, (True, False), strict=True):
        print(f"   {metric.replace('_', ' ')}: {_verdict(probable[metric], random[metric], larger)}")
    print()


def _verdict(found: Measure, random: Measure, larger: bool) -> str:
    """The verdict of Welch's test on two sets of networks."""
    from scipy.stats import ttest_ind

    chance = float(ttest_ind(found.values, random.values, equal_var=False).pvalue)
    better = (found.mean > random.mean) is larger
    if chance > 0.05:
        return f"the found topology and the best random one do not differ clearly (p = {chance:.2g})"
    return f"the {'found topology' if better else 'best random one'} is better (p = {chance:.2g})"


def run_scale(seed_topology: Topology, out: Path, images: Path) -> Topology:
    print(
        f"4. Scaling: {seed_topology} grows in depth and width while it stays within {format_count(MAX_PARAMS)} "
        "parameters."
    )
    steps = scale(
        seed_topology, max_params=MAX_PARAMS, images=images, seed=SEED, out=out,
        img_size=IMG_SIZE, repeats=REPEATS, batch=BATCH, progress=True,
    )  # fmt: skip
    rows: list[tuple[object, ...]] = [("step", "topology", "parameters", "multiply-adds")]
    rows += [(step.step, str(step.topology), format_count(step.params), format_count(step.flops)) for step in steps]
    print(table(rows, indent="   ") + "\n")
    return steps[-1].topology


def run_training(topology: Topology, patches: tuple[TensorDataset, TensorDataset], out: Path) -> None:
    print(
        "5. Training: the found topology learns from which photograph a grey patch is. Of the left "
        f"{BORDER:.0%} of the photographs\n   {len(patches[0])} patches are for training, of the rest "
        f"{len(patches[1])} for validation. Once with coarse tokens first\n   ({SCHEDULE}: epochs:reduction per side), "
        "and once with all tokens throughout, for at least as long."
    )
    coarse = train(topology, patches, schedule=SCHEDULE, epochs=EPOCHS, out=out / "train", **RECIPE)
    full_epoch = statistics.median(row["train_seconds"] for row in coarse.epochs if row["token_reduction"] == 1)
    epochs = math.ceil(coarse.seconds / full_epoch)
    full = train(topology, patches, schedule="1", epochs=epochs, out=out / "train_full_tokens", **RECIPE)
    rows = [("", "epochs", "seconds", "top-1, all tokens")]
    for name, result in (("coarse tokens first", coarse), ("all tokens throughout", full)):
        rows.append((name, str(len(result.epochs)), f"{result.seconds:.1f}", f"{result.top1:.1f} %"))
    classes = len(patches[0].tensors[1].unique())
    print(f"{table(rows, indent='   ')}\n   One answer in {classes} would be right by chance.\n")


def check_export(folder: Path, kept_out: TensorDataset) -> str:
    """Load the export the way any user of timm would, and give it the patches for validation."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, targets = kept_out.tensors  # [n, 3, IMG_SIZE, IMG_SIZE], [n]
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(1) for part in images.split(RECIPE["batch_size"])])  # [n]
    return f"timm loads it, and it has {100 * float((answers == targets).float().mean()):.1f} % of these patches right."


def write_images(folder: Path) -> int:
    """Write two squares of every photograph as PNG files, once; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, pixels in photographs():
        side = min(pixels.shape[:2]) * 3 // 4
        for number, square in enumerate((pixels[:side, :side], pixels[-side:, -side:]), start=1):
            path = folder / f"{name}_{number}.png"
            count += 1
            if not path.exists():
                scratch = path.with_name(f".{path.name}")
                size = (2 * IMG_SIZE, 2 * IMG_SIZE)
                Image.fromarray(square).resize(size, Image.Resampling.BICUBIC).save(scratch, "PNG")
                scratch.replace(path)
    return count


def make_patches(split: str) -> TensorDataset:
    """Grey patches of all photographs, half of them mirrored, always the same: images float32 [n, 3, IMG_SIZE,
    IMG_SIZE], normalised as our networks expect, and the numbers of their photographs, int64 [n]."""
    generator = np.random.default_rng([SEED, *split.encode()])
    images, targets = [], []
    for number, (_, pixels) in enumerate(photographs()):
        border = round(BORDER * pixels.shape[1])
        part = pixels[:, :border] if split == "training" else pixels[:, border:]  # [height, width, 3]
        for _ in range(PATCHES[split]):
            images.append(_patch(part, generator))
            targets.append(number)
    stack = torch.from_numpy(np.stack(images)).unsqueeze(1).expand(-1, 3, -1, -1) / 255  # [n, 3, side, side]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return TensorDataset((stack - mean) / std, torch.tensor(targets))


def _patch(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """uint8 [height, width, 3] -> a square of it in grey, uint8 [IMG_SIZE, IMG_SIZE]."""
    height, width = pixels.shape[:2]
    side = min(int(generator.integers(*PATCH_SIDE)), height, width)
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    patch = Image.fromarray(pixels[top : top + side, left : left + side]).convert("L")
    grey = np.asarray(patch.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC))
    return grey[:, ::-1].copy() if generator.random() < 0.5 else grey


def photographs() -> Iterator[tuple[str, np.ndarray]]:
    """Name and uint8 [height, width, 3]."""
    try:
        import skimage
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise InputError(
            f"the demo's images come with scikit-image and scikit-learn ({error}); pip install both"
        ) from None
    samples = load_sample_images()
    for file, pixels in zip(samples.filenames, samples.images, strict=True):
        yield Path(file).stem, pixels
    folder = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        if (folder / name).is_file():
            with Image.open(folder / name) as image:
                yield Path(name).stem, np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    raise SystemExit(main())
