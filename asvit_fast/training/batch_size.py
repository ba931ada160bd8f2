"""Images per pass in each phase: an update always sees the same number of images, in as many passes as memory wants."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import processes
from ..cost import peak_allocation
from ..errors import InputError
from ..recipe import TrainingRecipe
from .token_reduction import set_token_reduction, token_reduction

FORM = "expected reduction:images such as '4:1024,2:512', or 'auto'"


def phase_batch_sizes(
    recipe: TrainingRecipe, reductions: tuple[int, ...], measure: Callable[[int, int], int]
) -> dict[int, int]:
    """Images of one pass at each reduction.

    The images of an update stay batch_size x grad_accum_steps, so that nothing but speed changes: coarse tokens need
    less memory, so fewer and larger passes do. ``measure(reduction, images)`` gives the bytes of a pass, for "auto".

    Raises:
        InputError: a text that cannot be read, or a size that does not divide the images of an update.
    """
    per_update = recipe.batch_size * recipe.grad_accum_steps
    if recipe.phase_batch_sizes == "auto":
        budget = measure(1, recipe.batch_size)
        sizes = {
            reduction: _largest(per_update, recipe.batch_size, budget, functools.partial(measure, reduction))
            for reduction in reductions
        }
    else:
        requested = _parse(recipe.phase_batch_sizes)
        if not requested.keys() <= set(reductions):
            unknown = next(one for one in requested if one not in reductions)
            raise InputError(
                f"phase_batch_sizes: the schedule has no phase of reduction {unknown}, it has "
                f"{', '.join(map(str, reductions))}"
            )
        sizes = dict.fromkeys(reductions, recipe.batch_size) | requested
    for reduction, images in sizes.items():
        if images < 1 or per_update % images:
            raise InputError(
                f"phase_batch_sizes: {images} images at reduction {reduction} do not divide the {per_update} of an "
                "update "
                f"(batch_size {recipe.batch_size} x grad_accum_steps {recipe.grad_accum_steps})"
            )
        if recipe.mixes and images % 2:
            raise InputError(
                f"Mixup pairs images: a pass needs an even number, got {images}; change batch_size or mixup"
            )
    return {reduction: sizes[reduction] for reduction in reductions}


def least_of_ranks(sizes: dict[int, int]) -> dict[int, int]:
    """Take the smallest sizes of all ranks: what fits the memory of one need not fit another's, and all run as many
    passes."""
    ranks = processes.gather(sizes)
    return {reduction: min(one[reduction] for one in ranks) for reduction in sizes}


def _parse(text: str) -> dict[int, int]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part.strip()]
        return {int(reduction): int(images) for reduction, images in pairs}
    except ValueError:
        raise InputError(f"phase_batch_sizes: {FORM}, got {text!r}") from None


def _largest(per_update: int, smallest: int, budget: int, measure: Callable[[int], int]) -> int:
    """The largest divisor of ``per_update`` whose pass fits the budget, which ``smallest`` is known to do."""
    largest = smallest
    for images in range(smallest + 1, per_update + 1):
        if per_update % images == 0 and images % 2 == 0:  # even: Mixup pairs images
            try:
                if measure(images) > budget:
                    break
            except torch.OutOfMemoryError:
                break
            largest = images
    return largest


def pass_memory(
    model: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> Callable[[int, int], int]:
    """``measure`` for ``phase_batch_sizes``: bytes that forward and backward of zeros [images, *shape] allocate."""

    def measure(reduction: int, images: int) -> int:
        before = token_reduction(model)
        set_token_reduction(model, reduction)
        try:
            return peak_allocation(lambda: run(torch.zeros(images, *shape, device=device)), device)
        finally:
            set_token_reduction(model, before)

    def run(batch: Tensor) -> None:  # [B, 3, H, W]
        with autocast():
            loss = model(batch).float().sum()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    return measure
