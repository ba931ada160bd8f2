"""Training of detectors (As-ViT, arXiv 2202.11921, section 5.3): the loop, checkpoints and records of ``train``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backends import rank_device
from ..errors import InputError
from ..files import to_json, write_atomic
from ..recipe import DetectionRecipe, Recipe
from ..settings import DETECTORS, check_choice
from ..training.build import What, create_network, pixel_statistics
from ..training.callbacks import Callback
from ..training.result import TrainResult
from ..training.schedule import RetokenizationSchedule
from ..training.schedule_cost import ScheduleCost, schedule_cost
from ..training.step import Batches, Step, make_optimizer
from ..training.train import Trainer
from .bodies import any_size
from .build import build_detector, is_detector, start_from
from .coco import coco_masks
from .data import DetectionData, make_reader
from .detectors import MASKED
from .evaluate import DetectionEvaluation, evaluate_detector

DETECTIONS = "detections.json"  # of the last validation, in COCO's format of results


def train(
    model: What,
    data: Any,
    *,
    detector: str = "cascade_mask_rcnn",
    schedule: str | RetokenizationSchedule = "1",
    epochs: int = 36,
    out: str | os.PathLike[str] | None = None,
    img_size: int | tuple[int, int] = 224,
    out_channels: int = 256,
    windows: str = "fixed",
    norm: bool = True,
    frozen_stages: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    detector_kwargs: Mapping[str, Any] | None = None,
    initial_checkpoint: str = "",
    device: str | torch.device | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **recipe: Any,
) -> DetectionResult:
    """Train a detector. Under torchrun, on all its processes.

    A run directory that holds a begun training of the same options continues it, to the same bits on a CPU; what else
    ``asvit_fast.train`` promises of processes, epochs, SIGTERM and bad images holds here, too.

    Args:
        model: the backbone's network: a topology, a name of timm or torchvision, or a network.
        data: a folder in COCO's format (see ``asvit_fast.detection.coco``), or a pair of
            ``torchvision.datasets.CocoDetection`` (training, validation or None).
        detector: faster_rcnn, mask_rcnn, cascade_rcnn or cascade_mask_rcnn.
        schedule: epochs:reduction of tokens per side, as of ``asvit_fast.train``; "1" for full tokens.
        out: run directory: checkpoints, trace.jsonl, summary.csv, events of TensorBoard, detections.json of the last
            validation. None keeps nothing.
        img_size: pixels that the backbone's weights were trained with; its windows and position embedding are of these.
        out_channels, windows, norm, frozen_stages: see ``backbone``.
        model_kwargs: further arguments of the network (pretrained=True for timm's weights).
        detector_kwargs: fields of ``DetectorOptions``.
        initial_checkpoint: weights to start from: the network's, the folder of a training of ours or a file in timm's
            format, or a whole detector's, for the same detector and other data.
        progress: show a bar and lines of text, on stderr.
        callbacks: who follows the training, as of ``asvit_fast.train``.
        recipe: the fields of ``DetectionRecipe``.

    Raises:
        InputError: an option or data that cannot be used (before any work), an image that cannot be read, a loss that
            is not a number, a checkpoint that cannot be written; the last good checkpoint stays.
        SystemExit: with code 143, after SIGTERM and a checkpoint.
    """
    check_choice("detector", detector, DETECTORS)
    trainer = DetectionTrainer(
        model,
        data,
        RetokenizationSchedule.parse(schedule).for_epochs(epochs),
        DetectionRecipe.of(**recipe),
        epochs,
        rank_device(device),
        out=None if out is None else Path(out),
        img_size=img_size,
        model_kwargs=model_kwargs,
        initial_checkpoint=initial_checkpoint,
        progress=progress,
        callbacks=callbacks,
        detector=detector,
        pyramid={"out_channels": out_channels, "windows": windows, "norm": norm, "frozen_stages": frozen_stages},
        detector_kwargs=dict(detector_kwargs or {}),
    )
    trainer.run()
    return trainer.result


class DetectionResult(TrainResult):
    """The result of a detector's training: ``ap`` and ``best`` by COCO's AP of boxes."""

    @property
    def ap(self) -> float | None:
        """AP of boxes in the last validation, percent."""
        return next((row["ap"] for row in reversed(self.epochs) if row.get("ap") is not None), None)

    def _facts(self) -> dict[str, str]:
        facts = {"epochs": str(len(self.epochs)), "schedule": repr(str(self.schedule))}
        if self.epochs:
            facts["train_loss"] = f"{self.epochs[-1]['train_loss']:.4g}"
        if self.ap is not None:
            facts["ap"] = f"{self.ap:.2f} %"
        return {**facts, "seconds": f"{self.seconds:.1f}"}


class DetectionStep(Step):
    """One update of a detector: its loss is the sum of the losses that it returns."""

    def _set_up_loss(self, num_classes: int) -> None:
        self.regularization = None
        self._terms: dict[str, Tensor] = {}

    def _make_optimizer(self, images_per_update: int) -> torch.optim.Optimizer:
        return make_optimizer(self.recipe, self.model, images_per_update, filter_norms=not self.recipe.norm_decay)

    def _compile(self, network: Any) -> None:
        network.backbone.compile(dynamic=True)  # one graph for images of all sizes; the rest depends on what it finds

    @property
    def terms(self) -> dict[str, float]:
        """Parts of the last loss by name."""
        return {name.removeprefix("loss_"): value.item() for name, value in self._terms.items()}

    def _next(self, batches: Batches) -> Any:
        return self._wait(batches)

    def _loss(self, images: Any, targets: Any) -> Tensor:
        with self.autocast():
            losses = self.replica(images, targets)
        self._terms = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack(list(losses.values())).sum()


@dataclass(eq=False, repr=False)
class DetectionTrainer(Trainer):
    """One training of a detector; see ``train`` for the arguments."""

    kind: ClassVar[str] = "detect"

    detector: str = "cascade_mask_rcnn"
    pyramid: dict[str, Any] = field(default_factory=dict)
    detector_kwargs: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ what it is made of

    def _open_images(self) -> DetectionData:
        coco_masks()  # before any work
        reader = make_reader(self.recipe, self.device, self.rank, self.ranks)
        return DetectionData(self.data, reader, self.detector in MASKED)

    def _create_network(self) -> tuple[nn.Module, dict[str, Any]]:
        recipe = self.recipe
        options = dict(self.model_kwargs or {})
        if isinstance(self.model, str) and "|" not in self.model:
            options = {**any_size(self.model), **options}
        classes = getattr(self.model, "num_classes", 0) if isinstance(self.model, nn.Module) else 0
        start = self.initial_checkpoint
        whole = bool(start) and is_detector(start)
        network, description = create_network(
            self.model,
            classes,
            self.img_size,
            options,
            drop_path=recipe.drop_path,
            initial_checkpoint="" if whole else start,
        )
        mean, std = pixel_statistics(self.model, Recipe())
        sizes = {"min_size": recipe.min_size, "max_size": recipe.max_size, "image_mean": mean, "image_std": std}
        chosen = {**sizes, **self.detector_kwargs}
        made = build_detector(network, self.detector, self.images.num_classes + 1, self.pyramid, chosen)
        if whole:
            start_from(made, start)
        made.transform._skip_resize = recipe.augmentation != "none"  # torchvision's way to leave it to the data
        return made, {
            **description,
            "detector": self.detector,
            "pyramid": self.pyramid,
            "detector_kwargs": chosen,
            "categories": [list(one) for one in self.images.categories],
        }

    def _schedule_cost(self, network: Any) -> ScheduleCost:
        """Of the backbone with its pyramid: what tokens change."""
        return schedule_cost(network.backbone, self.schedule, self._side)

    @property
    def _side(self) -> int:
        """Pixels of a typical image."""
        return self.recipe.crop_size if self.recipe.augmentation == "lsj" else self.recipe.min_size

    def description_lines(self) -> Iterator[str]:
        *lines, table = super().description_lines()
        yield from lines
        yield f"{self.detector}; the cost of its backbone at {self._side} x {self._side} pixels:"
        yield table

    def _pass_memory(self, network: nn.Module) -> Callable[[int, int], int]:
        def measure(reduction: int, images: int) -> int:
            raise InputError("phase_batch_sizes must be numbers such as '4:64,2:32': what a detector needs varies")

        return measure

    def _make_step(self, network: nn.Module) -> Step:
        return DetectionStep(network, self.recipe, self.device, self.images.num_classes, self.images_per_update)

    def _warm_up(self) -> None:
        """Nothing: what a detector computes depends on what it finds."""

    # ------------------------------------------------------------------ validation

    def _validate(self) -> dict[str, float]:
        found = self._measure(self.step.model)
        row = dict(found.measures)
        for average in self.step.averages:
            row |= {f"ema_{name}": value for name, value in self._measure(average).measures.items()}
        if self.out is not None and self.rank == 0:
            write_atomic(self.out / DETECTIONS, to_json(found.detections))
        return row

    def _measure(self, network: nn.Module) -> DetectionEvaluation:
        images = self.interruption.until_stopped(self.images.eval_batches())
        masks = self.detector in MASKED
        try:
            found = evaluate_detector(
                network, images, self.images.validation, masks, autocast=self.step.autocast, ranks=self.ranks
            )
        except InputError:
            self.interruption.raise_if_stopped()
            raise
        self.interruption.raise_if_stopped()
        return found

    # ------------------------------------------------------------------ what is kept

    def _arguments(self) -> dict[str, Any]:
        return self.description

    def _summary(self) -> dict[str, Any]:
        result = self.result
        return {
            "model": self.description["model"],
            "detector": self.detector,
            "epochs": self.epochs,
            "ap": result.ap,
            "best": result.best,
            "train_seconds": result.seconds,
            "saving": result.cost.saving,
        }

    @property
    def result(self) -> DetectionResult:
        """The result of the training so far."""
        average = next(iter(self.step.averages), None)
        return DetectionResult(self.step.model, average, self.rows, self.schedule, self.cost, self.out)
