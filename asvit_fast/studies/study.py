"""A study: measure topologies untrained, train them, and compare the orders (As-ViT, Table 2 and Figure 2)."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import rank_device
from ..cost import topology_cost
from ..errors import InputError
from ..files import as_float, to_json
from ..images import fingerprint
from ..processes import init_process_group
from ..recipe import Recipe
from ..run_directory import TRACE, RunDirectory
from ..scoring.score import load
from ..search.distributed import Share, run_shared
from ..search.progress import Progress
from ..settings import ImageSize, ScoreSettings, StudySettings, check_integer, check_kind, check_seed
from ..topology import SearchSpace, Topology
from ..training.training_setup import Data
from .external import Accuracies, Candidates, read_accuracies, read_topologies
from .measures import NAMES, measure
from .result import Study
from .sample import sample
from .trainings import Trained, Trainer, fingerprint_of

EPOCHS = 300  # of the paper's trainings
APART = (  # fields of a recipe that results do not depend on
    "seed", "workers", "bad_images", "parallel", "checkpoint_interval", "eval_interval", "log_interval",
)  # fmt: skip
CHANGEABLE = ("topologies", "data")  # on going on: the fingerprint knows the data again
TRAININGS = "trainings"  # folder of those that are not on record yet
_MEASURES = -1  # in the place of a training's number
_FIELDS = (*NAMES, *(f"{name}.seconds" for name in NAMES))


class Task(NamedTuple):
    """A piece of work that any process can do: the measures of topology ``number``, or training ``repeat`` of it."""

    number: int
    repeat: int


def study(
    data: Data | None = None,
    topologies: int = StudySettings.topologies,
    epochs: int = EPOCHS,
    repeats: int = StudySettings.repeats,
    out: str | os.PathLike[str] | None = None,
    *,
    accuracies: Accuracies | None = None,
    candidates: Candidates | None = None,
    space: SearchSpace | None = None,
    sampling: str = StudySettings.sampling,
    repeat_every: int = StudySettings.repeat_every,
    width: int = StudySettings.width,
    score_repeats: int = StudySettings.score_repeats,
    img_size: ImageSize = ScoreSettings.img_size,
    thetas: int = ScoreSettings.thetas,
    batch: int = ScoreSettings.batch,
    images: Tensor | str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **recipe: Any,
) -> Study:
    """Find out which measures of untrained networks predict their accuracy on your data.

    Topologies are sampled, every measure is taken of each of them untrained (see ``studies/measures.py``: those of
    As-ViT in both conventions, sizes, and training-free measures of others), all are trained with one recipe, and the
    orders are compared. A run that was killed continues from ``out``, in the middle of a training, and ends as if it
    had not been; it is a pure function of its arguments. Under torchrun every process takes a topology of its own.

    Args:
        data: images to train and validate on, as ``train`` takes them.
        topologies: how many. A study on record may go on with more.
        epochs: of each training. repeats: trainings, of different seeds, of every ``repeat_every``-th topology, which
            tell how much of the differences is luck; the others are trained once.
        out: run directory; trace.jsonl has a row for each topology, result.json all correlations.
        accuracies: CSV file of topology and accuracy, or a dict {topology: accuracy, or a list of them}, of trainings
            done elsewhere, which take the place of sampling and training. Any unit, larger is better; nan: diverged.
        candidates: CSV file with a column ``topology``, such as the top.csv of a search, or a list of topologies, in
            the place of a sample.
        space: what is sampled, by default Table 1 of the paper. sampling: "stratified" over numbers of parameters, or
            "uniform". width: channels of the first stage, also of topologies given without.
        score_repeats: initialisations that each measure is averaged over. thetas, batch: as in ``score``.
        images: what the NTK looks at, as in ``score``; by default the training images in the folder ``data``.
        seed: of topologies, weights, circles, trainings and bootstrap.
        recipe: the fields of ``Recipe``, but for its seed.

    Raises:
        InputError: an option or data that cannot be used, a run directory of other options or whose data have changed
            since, before any work. A training that diverges is no error: it is marked and ranks last. Options that
            have no effect beside others are warned of.

    Examples:
        >>> import asvit_fast as af
        >>> small, large = "4,2,2|2,1,2|2,1,2|2,1,2|16", "4,2,4|2,1,4|2,1,4|2,1,4|16"
        >>> trained = {small: 71.5, large: 74.0}  # elsewhere
        >>> st = af.study(accuracies=trained, img_size=32, thetas=2, batch=2, score_repeats=1, progress=False)
        >>> st.kendall_tau["params"].value
        1.0
    """
    check_kind("space", space, SearchSpace | None, "a SearchSpace, or None for that of the paper")
    settings = StudySettings(topologies, sampling, width, repeats, repeat_every, score_repeats)
    check_seed(seed)
    check_integer("epochs", epochs, 1)
    if (data is None) == (accuracies is None):
        got = "neither" if data is None else "both"
        raise InputError(
            f"a study needs data to train on, or accuracies of trainings done elsewhere; got {got}, give one"
        )
    if accuracies is not None and candidates is not None:
        raise InputError("accuracies name the topologies that they are of; leave candidates out")
    scoring = ScoreSettings(img_size=img_size, thetas=thetas, repeats=score_repeats, batch=batch, device=device)
    if images is None and isinstance(data, (str, Path)):
        split = Path(data) / Recipe.of(**recipe).train_split
        images = split if split.is_dir() else None
    known = None if accuracies is None else read_accuracies(accuracies, width)
    given = None if candidates is None else read_topologies(candidates, width)
    run = _Study(SearchSpace() if space is None else space, settings, scoring, data, known, given, images, seed)
    run.prepare(epochs, recipe, out)
    notes = run.notes(epochs, recipe)

    def lead(share: Share[Task]) -> Study:
        for note in notes:
            warnings.warn(note, stacklevel=4)
        return run.run(share, progress)

    return run_shared(lead, run.work, run.device)


class _Study:
    """One study: its topologies, what is on record of them, and what is left to do."""

    def __init__(
        self,
        space: SearchSpace,
        settings: StudySettings,
        scoring: ScoreSettings,
        data: Data | None,
        known: dict[Topology, list[float]] | None,
        candidates: list[Topology] | None,
        images: Tensor | str | Path | None,
        seed: int,
    ) -> None:
        self.space, self.settings, self.data, self.seed = space, settings, data, seed
        self.device = rank_device(scoring.device)
        self.scoring = replace(scoring, device=self.device)
        self.images = load(images, self.scoring)  # [batch, 3, H, W]
        self.known = known
        self.candidates = candidates if known is None else list(known)
        self.topologies = self._sample() if self.candidates is None else self.candidates

    def prepare(self, epochs: int, recipe: dict[str, Any], out: str | os.PathLike[str] | None) -> None:
        """Check the recipe, and note all that the result depends on."""
        if "seed" in recipe:
            raise InputError("seed of the trainings is that of the study, counted up; give that one")
        checked = Recipe.of(**recipe)
        self.out = None if out is None else Path(out)
        kept = None if self.out is None else self.out / TRAININGS
        self.trainer: Trainer | None = None
        self.config: dict[str, Any] = {
            "kind": "study",
            "topologies": len(self.topologies),
            "width": self.settings.width,
            "seed": self.seed,
            "images": None if self.images is None else fingerprint(self.images),
            "score_repeats": self.scoring.repeats,
            **{name: getattr(self.scoring, name) for name in ("img_size", "thetas", "batch")},
        }
        if self.data is None:
            assert self.known is not None
            self.config["accuracies"] = "given"
            return
        self.trainer = Trainer(self.data, checked, epochs, self.scoring.img_size, self.device, self.seed, kept)
        if self.out is None or not (self.out / TRACE).exists():
            self.trainer.check(self.topologies[0])
        self.config |= {
            "data": str(self.data) if isinstance(self.data, (str, Path)) else "data sets",
            "data_fingerprint": fingerprint_of(self.data),
            **(self._sampling() if self.candidates is None else {"candidates": "given"}),
            "epochs": epochs,
            "repeats": self.settings.repeats,
            "repeat_every": self.settings.repeat_every,
            "recipe": {name: value for name, value in sorted(asdict(checked).items()) if name not in APART},
        }

    def notes(self, epochs: int, recipe: Mapping[str, Any]) -> list[str]:
        """What the user may not expect: options without effect, and a space that has no more topologies."""
        sampling = [*self.settings.changed("topologies", "sampling"), *["space"] * (self.space != SearchSpace())]
        if self.known is not None:
            unused = [*sampling, *self.settings.changed("repeats", "repeat_every"), *["epochs"] * (epochs != EPOCHS)]
            unused += [name for name, value in recipe.items() if value != getattr(Recipe, name)]
            why = "accuracies, whose networks are trained already"
        elif self.candidates is not None:
            unused, why = sampling, "candidates, which are all taken"
        else:
            missing = self.settings.topologies - len(self.topologies)
            size = f"the space has {len(self.topologies)} topologies, which are all taken"
            return [f"{size}, instead of {self.settings.topologies}"] * (missing > 0)
        return [f"no effect beside {why}: {', '.join(unused)}"] * bool(unused)

    def run(self, share: Share[Task], progress: bool) -> Study:
        """Do what is left of the study; rank 0 alone."""
        processes = init_process_group(self.device)
        with RunDirectory(
            self.out, self.config, None, changeable=CHANGEABLE, keeps=(TRAININGS,), rebuilds=True
        ) as directory:
            self._take_in(directory)
            total, done = len(self.topologies), len(directory.trace)
            recorded = f"{done} topologies" if done else ""
            with Progress("study", total, done, "topologies", progress, out=self.out, recorded=recorded) as shown:
                while (done := len(directory.trace)) < len(self.topologies):
                    for row in self._rows(share, range(done, min(done + processes, len(self.topologies)))):
                        directory.record(row, {})
                        self._clean_up(row["step"])
                        shown.step(row["step"] + 1, _describe(row))
            result = Study(directory.trace, self.seed)
            if directory.result is None:
                directory.finish(result.to_dict())
            return result

    def work(self, tasks: Sequence[Task]) -> list[tuple[float, ...]]:
        """Do tasks, whichever process this is."""
        results: list[tuple[float, ...]] = []
        for number, repeat in tasks:
            topology = self.topologies[number]
            if repeat == _MEASURES:
                values = measure(topology, self.scoring, self.images, self.seed)
                results.append(tuple(values[name] for name in _FIELDS))
            else:
                assert self.trainer is not None
                results.append(tuple(self.trainer(topology, number, repeat)))
        return results

    def trainings(self, number: int) -> int:
        """How many times a topology is trained."""
        if self.trainer is None:
            return 0
        return self.settings.repeats if number % self.settings.repeat_every == 0 else 1

    def _sampling(self) -> dict[str, Any]:
        """What decides the sample, for the configuration."""
        return {"space": self.space.dimensions, "sampling": self.settings.sampling}

    def _sample(self) -> list[Topology]:
        img_size, settings = self.scoring.img_size, self.settings
        return sample(
            self.space,
            settings.topologies,
            settings.width,
            settings.sampling,
            self.seed,
            lambda topology: topology_cost(topology, img_size).params,
        )

    def _take_in(self, directory: RunDirectory) -> None:
        """Check the rows on record; with more topologies than when they were made, go on behind them."""
        for number, row in enumerate(directory.trace):
            expected = str(self.topologies[number]) if number < len(self.topologies) else None
            if expected is None:
                raise directory.refuse_changes(f"{len(directory.trace)} topologies are on record, and none is dropped")
            if self.candidates is not None and row.get("topology") != expected:
                raise InputError(
                    f"{self.out} has {row.get('topology')} on record where {expected} is given: add new topologies "
                    "behind the others, or choose another run directory"
                )
            if reason := _damage(row, number, expected):
                raise directory.damaged_line(number, reason)
            known = None if self.known is None else self.known[self.topologies[number]]
            if known is not None and to_json(row["top1"]) != to_json(known):
                raise InputError(
                    f"{self.out}: accuracies of {expected} are {row['top1']} on record and {known} here; "
                    "choose another run directory"
                )
        if directory.changes:
            directory.accept_changes(directory.trace, None)

    def _rows(self, share: Share[Task], numbers: range) -> list[dict[str, Any]]:
        tasks = [Task(number, _MEASURES) for number in numbers]
        tasks += [Task(number, repeat) for number in numbers for repeat in range(self.trainings(number))]
        started = time.perf_counter()
        done = dict(zip(tasks, share(tasks), strict=True))
        seconds = time.perf_counter() - started
        return [self._row(number, done, seconds / len(numbers)) for number in numbers]

    def _row(self, number: int, done: dict[Task, tuple[float, ...]], seconds: float) -> dict[str, Any]:
        topology = self.topologies[number]
        values = dict(zip(_FIELDS, done[Task(number, _MEASURES)], strict=True))
        trained = [Trained(*done[Task(number, repeat)]) for repeat in range(self.trainings(number))]
        row: dict[str, Any] = {
            "step": number,
            "topology": str(topology),
            "top1": [one.top1 for one in trained] if self.known is None else self.known[topology],
            "measures": {name: values[name] for name in NAMES},
            "seconds": {name: values[f"{name}.seconds"] for name in NAMES},
        }
        for name in ("eval_loss", "train_loss"):
            row[name] = [getattr(one, name) for one in trained]
        return {**row, "train_seconds": [one.seconds for one in trained], "all_seconds": seconds}

    def _clean_up(self, number: int) -> None:
        """Remove the checkpoints of a topology that is on record."""
        if self.trainer is not None:
            for repeat in range(self.trainings(number)):
                if folder := self.trainer.folder(number, repeat):
                    shutil.rmtree(folder, ignore_errors=True)


def _damage(row: dict[str, Any], number: int, topology: str) -> str | None:
    """What is wrong with a row on record, or None."""
    if row.get("step") != number or row.get("topology") != topology:
        return f"is of topology {row.get('topology')!r} instead of {topology!r}"
    try:
        for name in NAMES:
            as_float(row["measures"][name]), as_float(row["seconds"][name])
        if not [as_float(value) for value in row["top1"]]:
            return "has no accuracy"
    except (KeyError, TypeError, ValueError) as error:
        return f"is not the row of a study ({type(error).__name__}: {error})"
    return None


def _describe(row: dict[str, Any]) -> str:
    accuracies = "/".join(f"{as_float(value):.4g}" for value in row["top1"])
    length = as_float(row["measures"]["length_distortion"])
    return f"{row['topology']}: accuracy {accuracies}, length {length:.4g}, {row['all_seconds']:.1f} s"
