"""Whole trainings with progressive re-tokenization: accuracy, and whether saved multiply-adds become saved time.

    python benchmarks/bench_retokenization.py [--csv FILE] [--seeds 0 1 2]

The paper's seed topology (As-ViT, arXiv 2202.11921) learns scikit-learn's digits at 64 x 64 pixels: with full tokens,
and with each schedule of Table 6, stretched to the length of the training. The trainings of a seed take turns, epoch by
epoch and in a turning order, so that a machine that slows down does so for all; time saved is against the one with
full tokens. A seed's rows are written when it ends, and seeds that the file has already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from digits import IMG_SIZE, digits

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.bench.timer import machine, print_header
from asvit_fast.files import write_atomic
from asvit_fast.malloc import tune_allocator
from asvit_fast.recipe import Recipe
from asvit_fast.training.rng import random_state, set_random_state
from asvit_fast.training.train import Trainer

FULL = "1"
SCHEDULES = (FULL, "table6-40", "table6-80", "table6-120")
RECIPE: dict[str, Any] = {
    "batch_size": 128,
    "lr": 2e-3,
    "warmup_epochs": 5,
    "drop_path": 0.0,
    "smoothing": 0.1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "model_ema_decay": 0.99,
}
SAME_RUN = ("model", "schedule", "seed", "epochs", "recipe", "machine", "threads", "torch")
SAME_SETTING = tuple(name for name in SAME_RUN if name != "schedule")  # seed included: runs that follow each other
SAME_ROW = tuple(name for name in SAME_RUN if name != "seed")  # of the table of medians


@dataclass(frozen=True)
class RetokenizationRow:
    """One training. Accuracies in percent; seconds in updates, and of all with validation; FLOPs are multiply-adds of
    the forward passes of the whole training, saved parts are against full tokens (empty until such a run is there)."""

    benchmark: str
    model: str
    schedule: str
    phases: str
    seed: int
    epochs: int
    recipe: str
    top1: float
    best_top1: float
    ema_top1: float
    train_seconds: float
    total_seconds: float
    flops: int
    flops_saved: float
    time_saved: float | str = ""
    ratio: float | str = ""


def recipe_text() -> str:
    return " ".join(f"{name}={value}" for name, value in RECIPE.items())


def trainer(model: str, schedule: str, seed: int, epochs: int, device: torch.device) -> Trainer:
    """The trainer that ``asvit_fast.train`` runs."""
    phases = af.RetokenizationSchedule.parse(schedule).for_epochs(epochs)
    recipe = Recipe.of(seed=seed, workers=0, eval_interval=5, **RECIPE)
    return Trainer(model, digits(), phases, recipe, epochs, device, img_size=IMG_SIZE, progress=False)


def run(model: str, schedules: Sequence[str], seed: int, epochs: int, device: torch.device) -> list[RetokenizationRow]:
    """Train with all schedules side by side: an epoch of each in turn, each with its own random numbers."""
    trainers = [trainer(model, schedule, seed, epochs, device) for schedule in schedules]
    runs = [one.iterate() for one in trainers]
    states = [random_state(device)] * len(runs)
    for epoch in range(epochs):
        for turn in range(len(runs)):
            index = (epoch + turn) % len(runs)
            set_random_state(states[index], device)
            next(runs[index])
            states[index] = random_state(device)
    return [row(model, name, seed, one.result) for name, one in zip(schedules, trainers, strict=True)]


def row(model: str, schedule: str, seed: int, result: af.TrainResult) -> RetokenizationRow:
    epochs = len(result.epochs)
    images = len(digits()[0]) // RECIPE["batch_size"] * RECIPE["batch_size"]  # of an epoch
    last = result.epochs[-1]
    return RetokenizationRow(
        benchmark="retokenization",
        model=model,
        schedule=schedule,
        phases=" ".join(f"{phase.length}:{phase.reduction}" for phase in result.schedule.phases),
        seed=seed,
        epochs=epochs,
        recipe=recipe_text(),
        top1=round(last["top1"], 2),
        best_top1=round(max(row["top1"] for row in result.epochs if "top1" in row), 2),
        ema_top1=round(last["ema_top1"], 2),
        train_seconds=round(result.seconds, 3),
        total_seconds=round(sum(row["seconds"] for row in result.epochs), 3),
        flops=round(images * epochs * result.cost.macs[1] * (1 - result.cost.saving)),
        flops_saved=round(result.cost.saving, 4),
    )


Record = dict[str, Any]


def key(record: Record, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in names)


def with_savings(records: list[Record]) -> list[Record]:
    """Time saved against the run of the same setting with full tokens, and what part of the saved FLOPs that is."""
    full = {key(record, SAME_SETTING): float(record["train_seconds"]) for record in records if is_full(record)}
    finished = []
    for record in records:
        seconds = full.get(key(record, SAME_SETTING))
        if seconds is not None and not is_full(record):
            saved = 1 - float(record["train_seconds"]) / seconds
            record = record | {
                "time_saved": round(saved, 4), "ratio": round(saved / float(record["flops_saved"]), 4)
            }  # fmt: skip
        finished.append(record)
    return finished


def is_full(record: Record) -> bool:
    return str(record["schedule"]) == FULL


def read(path: Path, columns: Sequence[str]) -> list[Record]:
    """Rows that are there. Raises SystemExit if they have other columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise SystemExit(f"{path} has other columns: remove it, or name another file with --csv")
        return list(reader)


def write(path: Path, records: list[Record], columns: Sequence[str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue())


def show(records: list[Record]) -> None:
    """Print the table of medians over the seeds, in the README's form."""
    print("| schedule | phases, epochs:reduction | runs | top-1 | of the average | seconds | time saved | FLOPs saved |"
          " time / FLOPs |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record, SAME_ROW), []).append(record)
    for part in groups.values():
        top1, ema, seconds = (median(part, name) for name in ("top1", "ema_top1", "train_seconds"))
        saved = (median(part, "time_saved"), median(part, "flops_saved"), median(part, "ratio"))
        last = "- | - | -" if is_full(part[0]) else f"{saved[0]:.1%} | {saved[1]:.1%} | {saved[2]:.2f}"
        print(f"| {part[0]['schedule']} | {part[0]['phases']} | {len(part)} | {top1:.1f} | {ema:.1f} | {seconds:.1f} |"
              f" {last} |")  # fmt: skip


def median(part: list[Record], name: str) -> float:
    """Over the rows that have a value."""
    values = [float(record[name]) for record in part if record[name] != ""]
    return statistics.median(values) if values else float("nan")


def main() -> None:
    """Do the runs that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--model", default="asvit_seed", help="a topology, or a name of timm")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--csv", type=Path, default=None, help="read the runs that are done from here, write all")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    tune_allocator()  # as `asvit-fast train` does
    device = backends.resolve_device(arguments.device)
    here = machine(device)
    columns = [*(column.name for column in fields(RetokenizationRow)), *here]
    records = [] if arguments.csv is None else read(arguments.csv, columns)
    print_header(device)
    for seed in arguments.seeds:
        wanted = here | {"model": arguments.model, "seed": seed, "epochs": arguments.epochs, "recipe": recipe_text()}
        done = {key(record, SAME_RUN) for record in records}
        if all(key(wanted | {"schedule": schedule}, SAME_RUN) in done for schedule in arguments.schedules):
            continue
        rows = run(arguments.model, arguments.schedules, seed, arguments.epochs, device)
        records = with_savings([*records, *(asdict(one) | here for one in rows)])
        for one in rows:
            print(f"{one.schedule}, seed {seed}: top-1 {one.top1}, {one.train_seconds:.1f} s", flush=True)
        if arguments.csv is not None:
            write(arguments.csv, records, columns)
    show(records)


if __name__ == "__main__":
    main()
