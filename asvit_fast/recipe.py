"""The recipes of trainings: every choice that has a default. Names and meanings are those of timm's train.py."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any, ClassVar, Self

from .errors import InputError

WORKERS = min(4, os.cpu_count() or 1)
BASE_BATCH, DETECTION_BATCH = 1024, 256  # images per update for which ``lr_base`` is meant
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
DETECTION_AUGMENTATIONS = ("lsj", "multiscale", "none")


def are_numbers(value: Any) -> bool:
    """Return whether it is a list of finite numbers, one at least."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    )


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel, as timm's loaders adapt them: their average where there are others."""
    return tuple(values) if len(values) == channels else (fmean(values),) * channels


Needs = dict[str, tuple[str, Callable[[Any], bool]]]  # option: what it needs to do anything, and whether that is so


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingRecipe:
    """The choices that every kind of training has.

    Raises:
        InputError: a value out of its range, naming it.
    """

    base_batch: ClassVar[int] = BASE_BATCH
    needs: ClassVar[Needs] = {
        "amp_dtype": ("amp", lambda recipe: recipe.amp),
        "model_ema_decay": ("model_ema", lambda recipe: recipe.model_ema),
        "lr_base": ("no lr", lambda recipe: recipe.lr is None),
        "lr_base_scale": ("no lr", lambda recipe: recipe.lr is None),
    }

    # network
    drop_path: float = _option(0.1, "rate of stochastic depth in the last block")
    grad_checkpointing: bool = _option(False, "compute activations again in the backward pass instead of keeping them")
    channels_last: bool = _option(False, "images in channels-last memory")
    torchcompile: bool = _option(False, "compile the network, one graph for each token reduction")

    # optimisation
    opt: str = _option("adamw", "timm's name of the optimizer")
    lr: float | None = _option(None, "learning rate; without it, lr_base scaled to the batch as timm does")
    lr_base: float = _option(1e-3, f"learning rate for {BASE_BATCH} images per update")
    lr_base_scale: str = _option("", "how lr_base follows the batch: linear, sqrt; by default sqrt for Adam-like ones")
    weight_decay: float = _option(0.05, "weight decay")
    layer_decay: float | None = _option(None, "factor of the learning rate from a layer to the one before it")
    sched: str = _option("cosine", "timm's name of the learning rate schedule")
    warmup_epochs: int = _option(20, "epochs of linear warm-up, at most a fifth of the training")
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up")
    min_lr: float = _option(1e-5, "learning rate at the end")
    batch_size: int = _option(128, "images of one pass, per rank")
    grad_accum_steps: int = _option(1, "passes per update: batch_size x this x ranks images an update")
    phase_batch_sizes: str = _option(
        "", "images of one pass by token reduction, '4:1024,2:512', or auto: what fits the memory of full tokens"
    )
    clip_grad: float | None = _option(None, "largest gradient norm")
    amp: bool = _option(False, "mixed precision")
    amp_dtype: str = _option("bfloat16", "half type of mixed precision: bfloat16 or float16")
    model_ema: bool = _option(True, "keep an exponential moving average of the weights")
    model_ema_decay: float = _option(0.9999, "decay of the average")
    model_ema_warmup: bool = _option(True, "a smaller decay at first: short trainings need it")

    # running
    workers: int = _option(WORKERS, "processes that read images, per rank; 0 reads in the training process")
    bad_images: str = _option("stop", "an image that cannot be read: stop, or skip to the next one")
    seed: int = _option(0, "seed of weights, order, augmentation and dropout")
    parallel: str = _option("ddp", "under torchrun: ddp (replicas) or fsdp (FSDP2, parameters in shards)")
    checkpoint_interval: int = _option(500, "updates between checkpoints inside an epoch; 0: at the end of epochs only")
    eval_interval: int = _option(1, "epochs between validations; the last one is always validated")
    log_interval: int = _option(50, "updates between log entries")

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum_steps", "eval_interval", "log_interval"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("workers", "warmup_epochs", "checkpoint_interval", "weight_decay", "seed"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("seed", self.seed < 2**63, "at most 2**63 - 1")
        for name in ("drop_path", "model_ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        for name in ("lr", "lr_base", "clip_grad", "layer_decay"):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        for name, choices in (
            ("bad_images", ("stop", "skip")),
            ("lr_base_scale", ("", "linear", "sqrt")),
            ("amp_dtype", ("bfloat16", "float16")),
            ("parallel", ("ddp", "fsdp")),
        ):
            self._check_choice(name, choices)

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        self._check(name, getattr(self, name) in choices, "one of " + ", ".join(map(repr, choices)))

    def without_effect(self) -> list[str]:
        """What was chosen and changes nothing beside the other choices, in a line each."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        chosen = [one.name for one in fields(self) if one.name in self.needs and values[one.name] != one.default]
        return [
            f"{name} {values[name]!r} has no effect: it needs {self.needs[name][0]}"
            for name in chosen
            if not self.needs[name][1](self)
        ]

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, and their targets soft."""
        return False

    def learning_rate(self, images_per_update: int) -> float:
        """``lr``, or ``lr_base`` scaled to the images of an update by timm's rule."""
        if self.lr is not None:
            return self.lr
        adaptive = any(name in self.opt.lower() for name in ("ada", "lamb"))
        scale = self.lr_base_scale or ("sqrt" if adaptive else "linear")
        return self.lr_base * (images_per_update / self.base_batch) ** (0.5 if scale == "sqrt" else 1.0)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The recipe with some choices changed. Raises InputError for a name that is none of its choices."""
        choices = [one.name for one in fields(cls)]
        unknown = [name for name in options if name not in choices]
        if unknown:
            raise InputError(f"unknown option {', '.join(unknown)}; one of {', '.join(choices)}")
        return cls(**options)


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """The recipe of a classifier's training; by default the paper's (As-ViT, arXiv 2202.11921, section 4 and appendix),
    whose unstated strengths of augmentation are those of DeiT (arXiv 2012.12877).

    Raises:
        InputError: a value out of its range, naming it.
    """

    needs: ClassVar[Needs] = {
        **TrainingRecipe.needs,
        **dict.fromkeys(
            ("scale", "ratio", "hflip", "color_jitter", "aa", "reprob", "remode"),
            ("augmentation, which no_aug leaves out", lambda recipe: not recipe.no_aug),
        ),
        "mixup_prob": ("mixup or cutmix", lambda recipe: recipe.mixes),
        "mixup_switch_prob": ("mixup and cutmix", lambda recipe: recipe.mixup > 0 and recipe.cutmix > 0),
    }

    # data
    dataset: str = _option(
        "", "timm's name of the data set: folder, tar, 'hfds/NAME', 'hfids/NAME', 'wds/NAME', 'tfds/NAME'"
    )
    train_split: str = _option("train", "split, or subfolder, to train on")
    val_split: str = _option("validation", "split, or subfolder, to validate on ('val' is found as well); '' for none")
    class_map: str = _option("", "file of class names, one a line, or timm's mapping of class to index")

    # augmentation
    no_aug: bool = _option(False, "only resize and crop to the centre")
    scale: tuple[float, float] = _option((0.08, 1.0), "area of the random crop, parts of the image")
    ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "aspect ratio of the random crop")
    hflip: float = _option(0.5, "probability of a horizontal flip")
    color_jitter: float = _option(0.4, "strength of colour jitter where RandAugment does not replace it")
    aa: str = _option("rand-m9-mstd0.5-inc1", "timm's policy of AutoAugment or RandAugment; '' for none")
    reprob: float = _option(0.25, "probability of random erasing")
    remode: str = _option("pixel", "what erased rectangles hold: const, rand or pixel")
    mixup: float = _option(0.8, "alpha of Mixup, 0 for none")
    cutmix: float = _option(1.0, "alpha of CutMix, 0 for none")
    mixup_prob: float = _option(1.0, "probability of Mixup or CutMix for a batch")
    mixup_switch_prob: float = _option(0.5, "probability of CutMix where both are on")
    interpolation: str = _option("bicubic", f"how images are resized: {', '.join(INTERPOLATIONS)}, random")
    crop_pct: float = _option(0.9, "part of the image that validation keeps")
    crop_mode: str = _option("center", f"how validation makes images square: {', '.join(CROP_MODES)}")
    mean: tuple[float, ...] | None = _option(
        None, "mean of the pixels, from 0 to 1, one number or one for each channel; without it, the network's"
    )
    std: tuple[float, ...] | None = _option(None, "standard deviation of the pixels, likewise")
    smoothing: float = _option(0.1, "label smoothing")
    bce_loss: bool = _option(False, "binary cross-entropy on soft targets")
    regularizers: str = _option(
        "",
        "losses for diversity with their factors: patch, contrast, attention, weight; published for DeiT-S: "
        "'patch:0.5,contrast:0.5,attention:1e-4,weight:0.018'",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixup", "cutmix"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            self._check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._check("smoothing", 0 <= self.smoothing < 1, "from 0 to below 1")
        self._check("crop_pct", 0 < self.crop_pct <= 1, "above 0 and at most 1")
        self._check("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "a smaller and a larger part of 0 to 1, above 0")
        self._check("ratio", 0 < self.ratio[0] <= self.ratio[1], "a smaller and a larger number above 0")
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), (int, float)):
                object.__setattr__(self, name, (getattr(self, name),))
            self._check(name, getattr(self, name) is None or are_numbers(getattr(self, name)), "numbers")
        self._check("std", self.std is None or min(self.std) > 0, "numbers above 0")
        for name, choices in (
            ("remode", ("const", "rand", "pixel")),
            ("interpolation", (*INTERPOLATIONS, "random")),
            ("crop_mode", CROP_MODES),
        ):
            self._check_choice(name, choices)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, and their targets soft."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class DetectionRecipe(TrainingRecipe):
    """The recipe of a detector's training; by default the paper's (As-ViT, arXiv 2202.11921, section 5.3 and appendix):
    AdamW, 1e-3 for 256 images, weight decay 1e-4, 36 epochs, stochastic depth, crops of 1024 pixels.

    Raises:
        InputError: a value out of its range, naming it.
    """

    base_batch: ClassVar[int] = DETECTION_BATCH
    needs: ClassVar[Needs] = {
        **TrainingRecipe.needs,
        "crop_size": ("augmentation lsj", lambda recipe: recipe.augmentation == "lsj"),
        "scale_jitter": ("augmentation lsj", lambda recipe: recipe.augmentation == "lsj"),
        "scales": ("augmentation multiscale", lambda recipe: recipe.augmentation == "multiscale"),
    }

    # data
    train_split: str = _option("train", "instances_NAME*.json to train on, and its folder of images")
    val_split: str = _option("val", "the same to validate on; '' for none")

    # augmentation
    augmentation: str = _option(
        "lsj", "lsj (large-scale jitter and crops), multiscale (a short side drawn from scales) or none"
    )
    hflip: float = _option(0.5, "probability of a horizontal flip")
    crop_size: int = _option(1024, "side of lsj's crops in pixels")
    scale_jitter: tuple[float, float] = _option(
        (0.1, 2.0), "lsj: smallest and largest ratio of the image's size to the crop's"
    )
    scales: tuple[float, float] = _option(
        (480.0, 800.0), "multiscale: smallest and largest short side in pixels, in steps of 32"
    )
    min_size: int = _option(800, "short side that images are tested with, in pixels, as far as max_size allows")
    max_size: int = _option(1333, "longest side of multiscale training and of tests, in pixels")

    # optimisation
    lr_base: float = _option(1e-3, f"learning rate for {DETECTION_BATCH} images per update")
    weight_decay: float = _option(1e-4, "weight decay")
    norm_decay: bool = _option(True, "weight decay of norms, biases and position embeddings as well")
    warmup_epochs: int = _option(1, "epochs of linear warm-up, at most a fifth of the training")
    batch_size: int = _option(16, "images of one pass, per rank")
    grad_accum_steps: int = _option(16, "passes per update: batch_size x this x ranks images an update")
    model_ema: bool = _option(False, "keep an exponential moving average of the weights")
    log_interval: int = _option(10, "updates between log entries")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("augmentation", DETECTION_AUGMENTATIONS)
        self._check("hflip", 0 <= self.hflip <= 1, "from 0 to 1")
        for name in ("crop_size", "min_size", "max_size"):
            self._check(name, getattr(self, name) >= 32, "32 pixels or more")
        self._check("max_size", self.max_size >= self.min_size, f"min_size ({self.min_size}) or more")
        self._check(
            "scale_jitter", 0 < self.scale_jitter[0] <= self.scale_jitter[1], "two numbers above 0, the smaller first"
        )
        self._check("scales", 32 <= self.scales[0] <= self.scales[1], "two numbers from 32 pixels, the smaller first")
