"""Detectors on real images: handwritten digits on photographs, in COCO's format (``coco_digits.py``).

The seed topology with Mask R-CNN and with the cascade, with coarse tokens first, the topology that the demo's search
finds, and a ResNet-18 of about the seed's cost, three seeds each: AP, AP of masks, seconds. Fixed windows are compared
with split ones at two and four times the size of images. Every training can be stopped and goes on.

    python benchmarks/bench_detection.py --out runs/bench_detection --csv benchmarks/results/zen3/detection.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from coco_digits import write_coco_digits

import asvit_fast as af
from asvit_fast import demo
from asvit_fast.cost import params
from asvit_fast.detection import detector_macs, evaluate_detector, load_detector, open_coco
from asvit_fast.detection.data import DetectionLoader, DetectionPrefetcher, make_reader
from asvit_fast.files import write_atomic
from asvit_fast.machine import processor
from asvit_fast.recipe import DetectionRecipe
from asvit_fast.topology import NAMED_TOPOLOGIES

IMAGES = 2000
SEEDS = (0, 1, 2)
FACTORS = (2, 4)  # of the larger test sizes
COLUMNS = (
    "name", "seed", "schedule", "epochs", "params", "macs", "windows", "min_size", "ap", "ap50", "ap75", "mask_ap",
    "mask_ap50", "mask_ap75", "train_seconds", "machine",
)  # fmt: skip
OPTIONS: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "examples" / "detect_digits.yaml").read_text())


@dataclass(frozen=True)
class Case:
    """A training: its name in the table, what is trained, and how."""

    name: str
    model: str
    options: dict[str, Any]
    seed: int


def cases(found: str, seeds: Iterable[int]) -> list[Case]:
    """All of a seed, then those of the next."""
    seed_topology = NAMED_TOPOLOGIES["asvit_seed"]
    narrow = {"drop_path": 0.0, "model_kwargs": {"channels": [32, 64, 128, 256], "stem_width": 32}, "norm": False}
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("seed topology, Mask R-CNN", seed_topology, {"detector": "mask_rcnn"}),
        ("seed topology, Cascade Mask R-CNN", seed_topology, {"detector": "cascade_mask_rcnn"}),
        (
            "seed topology, Mask R-CNN, coarse tokens first",
            seed_topology,
            {"detector": "mask_rcnn", "schedule": "1:2,2:1"},
        ),
        ("found topology, Mask R-CNN", found, {"detector": "mask_rcnn"}),
        ("ResNet-18 of half the width, Mask R-CNN", "resnet18", {"detector": "mask_rcnn", **narrow}),
    ]
    return [Case(*kind, seed) for seed, kind in itertools.product(seeds, kinds)]


def find_topology(out: Path) -> str:
    """The topology that the demo's search finds, searched once."""
    demo.write_images(out / "images")
    return str(demo.run_search(out / "search", out / "images").topology)


def run(case: Case, data: Path, out: Path) -> list[dict[str, Any]]:
    """Train, or go on, and return the rows of the case."""
    torch.set_num_threads(1)
    folder = out / f"{case.name} {case.seed}".replace(",", "").replace(" ", "_").lower()
    options = {**OPTIONS, "seed": case.seed, **case.options}
    result = af.detection.train(case.model, data, out=folder, **options)
    detector: Any = result.model
    row = {
        "name": case.name, "seed": case.seed, "schedule": str(result.schedule), "epochs": OPTIONS["epochs"],
        "params": params(detector), "macs": detector_macs(detector, 128, 50, 10)["all"], "windows": "fixed",
        "min_size": OPTIONS["min_size"], **result.epochs[-1], "train_seconds": round(result.seconds, 1),
        "machine": processor(),
    }  # fmt: skip
    rows = [row]
    if case.name == "seed topology, Mask R-CNN":
        larger = itertools.product(FACTORS, ("fixed", "split"))
        rows += [{**row, **at_larger_size(folder, data, factor, windows)} for factor, windows in larger]
    return [{name: row.get(name) for name in COLUMNS} for row in rows]


def at_larger_size(folder: Path, data: Path, factor: int, windows: str) -> dict[str, Any]:
    """The detector of a run on images of another size, with windows that stay or that grow with the map."""
    loaded = load_detector(folder, windows=windows)
    transform: Any = loaded.model.transform
    transform.min_size, transform.max_size = (factor * OPTIONS["min_size"],), factor * OPTIONS["max_size"]
    truth, device = open_coco(data, "val", masks=True), torch.device("cpu")
    loader = DetectionLoader(truth, make_reader(DetectionRecipe(workers=0), device), len(truth.categories), False)
    found = evaluate_detector(loaded.model, DetectionPrefetcher(device)(loader(0, 0, loader.images, 1)), truth, True)
    return {**found.measures, "windows": windows, "min_size": factor * OPTIONS["min_size"]}


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_detection"), help="folder of images and trainings")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/zen3/detection.csv"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, a thread each")
    arguments = parser.parse_args()
    data = arguments.out / "coco_digits"
    write_coco_digits(data, IMAGES)
    found = find_topology(arguments.out)
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        all_cases = cases(found, arguments.seeds)
        for finished in pool.map(run, all_cases, itertools.repeat(data), itertools.repeat(arguments.out / "runs")):
            rows += finished
            write_rows(rows, arguments.csv)


if __name__ == "__main__":
    main()
