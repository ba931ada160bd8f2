"""Everything that a training needs, made of its arguments before it starts: data, network, optimizer, schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import processes
from ..cost import params
from ..errors import InputError
from ..recipe import Recipe
from .batch_size import least_of_ranks, pass_memory, phase_batch_sizes
from .build import What, channels_of, create_network, pixel_statistics
from .callbacks import Callback
from .data import DataSets, Reader, load_data
from .resume import CHANGEABLE_ON_RESUME, PASSES
from .retokenizer import Retokenizer
from .rng import seed_everything
from .schedule import RetokenizationSchedule
from .schedule_cost import ScheduleCost, schedule_cost
from .step import Step, autocast, make_scheduler, prepare

Data = str | Path | DataSets


@dataclass(eq=False, repr=False)
class TrainingSetup:
    """Everything of a training that does not change while it runs; see ``train`` for the arguments."""

    kind: ClassVar[str] = "train"  # of the run directory

    model: What
    data: Any
    schedule: RetokenizationSchedule
    recipe: Any
    epochs: int
    device: torch.device
    out: Path | None = None
    img_size: int | tuple[int, int] = 224
    num_classes: int | None = None
    model_kwargs: Mapping[str, Any] | None = None
    initial_checkpoint: str = ""
    resume: str = ""
    progress: bool = True
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        recipe, device = self.recipe, self.device
        self.ranks = processes.init_process_group(device)
        self.rank = processes.rank()
        seed_everything(recipe.seed, device)
        self.images = self._open_images()
        network, self.description = self._create_network()
        self.cost = self._schedule_cost(network)
        prepare(network, recipe, device)
        memory = self._pass_memory(network)
        self.batch_sizes = least_of_ranks(phase_batch_sizes(recipe, self.schedule.reductions, memory))
        self.step = self._make_step(network)
        self.retokenizer = Retokenizer(self.step.replica, self.schedule, *self.step.averages)
        self.updates_per_epoch = self._updates_per_epoch()
        self.scheduler = make_scheduler(recipe, self.step.optimizer, self.epochs, self.updates_per_epoch)

    def _open_images(self) -> Any:
        channels = channels_of(self.model, self.model_kwargs)
        mean, std = pixel_statistics(self.model, self.recipe, channels)
        self.reader = Reader(self.recipe, self.img_size, self.device, self.rank, self.ranks, channels, mean, std)
        return load_data(self.data, self.reader, self.num_classes)

    def _create_network(self) -> tuple[nn.Module, dict[str, Any]]:
        network, description = create_network(
            self.model,
            self.images.num_classes,
            self.img_size,
            self.model_kwargs,
            drop_path=self.recipe.drop_path,
            initial_checkpoint=self.initial_checkpoint,
        )
        return network, description | {"mean": list(self.reader.mean), "std": list(self.reader.std)}

    def _schedule_cost(self, network: nn.Module) -> ScheduleCost:
        return schedule_cost(network, self.schedule, self.img_size)

    def _pass_memory(self, network: nn.Module) -> Callable[[int, int], int]:
        return pass_memory(network, self.reader.shape, self.device, lambda: autocast(self.recipe, self.device))

    def _make_step(self, network: nn.Module) -> Step:
        return Step(network, self.recipe, self.device, self.images.num_classes, self.images_per_update)

    @property
    def images_per_update(self) -> int:
        """Images of an update over all ranks."""
        return self.recipe.batch_size * self.recipe.grad_accum_steps * self.ranks

    def _updates_per_epoch(self) -> int:
        per_rank = self.images_per_update // self.ranks
        if self.images.images_per_rank < per_rank:
            raise InputError(
                f"{self.images.train_images} images are fewer than one update takes ({self.images_per_update}); "
                f"lower batch_size ({self.recipe.batch_size}) or grad_accum_steps ({self.recipe.grad_accum_steps})"
            )
        return self.images.images_per_rank // per_rank

    def config(self) -> dict[str, Any]:
        """The options that a run directory must agree on with a run that continues it."""
        recipe = dataclasses.asdict(self.recipe)
        return {
            "kind": self.kind,
            "model": self.description,
            "data": str(self.data) if isinstance(self.data, (str, Path)) else "data sets",
            "train_images": self.updates_per_epoch * self.images_per_update,  # of an epoch
            "schedule": str(self.schedule),
            "epochs": self.epochs,
            "images_per_update": self.images_per_update,
            "flops": {str(reduction): macs for reduction, macs in self.cost.macs.items()},
            "saving": self.cost.saving,
            "processes": self.ranks,
            **{name: recipe[name] for name in PASSES},
            "recipe": {name: value for name, value in recipe.items() if name not in CHANGEABLE_ON_RESUME},
        }

    def description_lines(self) -> Iterator[str]:
        """Say what is trained, on how much data, at what cost."""
        model, rate = self.description["model"], self.recipe.learning_rate(self.images_per_update)
        classes = self.images.num_classes
        yield f"{model}: {params(self.step.model) / 1e6:.2f} M parameters, {classes} class{'es' * (classes != 1)}"
        yield (
            f"{self.images.train_images} images, {self.images_per_update} an update, {self.updates_per_epoch} updates "
            f"an epoch, {self.epochs} epochs; learning rate {rate:.3g}"
        )
        yield self.cost.table()

    def notes(self) -> Iterator[str]:
        """Say which choices are hardly what was meant."""
        rate = self.recipe.learning_rate(self.images_per_update)
        yield from self.recipe.without_effect()
        if self.recipe.min_lr > rate:
            yield f"min_lr {self.recipe.min_lr:g} is above the learning rate {rate:g}, which will rise to it"
        if isinstance(self.recipe, Recipe) and self.images.num_classes == 1:
            yield "all images are of one class, which teaches a classifier nothing"
