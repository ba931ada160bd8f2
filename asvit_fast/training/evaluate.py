"""Top-1, top-5 and loss of a network on labelled images, as timm's validation counts them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..errors import InputError
from ..modes import evaluation_mode

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Number of images, percentages of right answers among the first one and five, mean loss."""

    images: int
    top1: float
    top5: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of numbers."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ranks: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Run the network over ``batches`` in evaluation mode, without gradients; its modules' modes are put back.

    Args:
        model: images [b, 3, H, W] -> logits [b, classes]; of fewer than 5 classes, top-5 counts all.
        batches: (images, targets int64 [b]) on ``device``, this rank's share; shares may differ in length.
        autocast: makes the context of each forward pass.
        loss: (logits, targets) -> mean loss of the batch; cross-entropy without it.
        ranks: number of processes of torch.distributed that evaluate together; every one gets the result of all.
        progress: show a progress bar, where stderr is a terminal.

    Raises:
        InputError: no images on any rank.
    """
    context, criterion = autocast or contextlib.nullcontext, loss or F.cross_entropy
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, right among one, right among five, loss
    together = ranks > 1 and isinstance(model, FSDPModule)
    counted = _in_step(batches, device) if together else ((batch, True) for batch in batches)
    with evaluation_mode(model), torch.no_grad():  # inference_mode would leave FSDP2 with tensors that cannot train
        for (images, targets), counts in tqdm(
            counted, desc="evaluating", unit=" batches", leave=False, disable=None if progress else True
        ):
            with context():
                logits = model(images)  # [b, classes]
                mean_loss = criterion(logits, targets)
            if counts:
                sums += _sums(logits, targets, mean_loss)
    if ranks > 1:
        dist.all_reduce(sums)
    count, first, five, total = sums.tolist()
    if not count:
        raise InputError("there are no images to evaluate; give other data")
    return Evaluation(int(count), 100 * first / count, 100 * five / count, total / count)


def _sums(logits: Tensor, targets: Tensor, mean_loss: Tensor) -> Tensor:
    """[4]: images, right answers among the first one and the first five, loss; whole numbers are exact."""
    images = len(targets)
    right = [(percent * images / 100).round() for percent in accuracy(logits, targets, topk=(1, 5))]
    counts = torch.stack([torch.tensor(images, device=logits.device), *right]).double()  # [3]
    return torch.cat([counts, mean_loss.double().view(1) * images])


def _in_step(batches: Batches, device: torch.device) -> Iterator[tuple[tuple[Tensor, Tensor], bool]]:
    """A rank without images left repeats uncounted ones: a sharded network runs on all ranks or on none."""
    remaining = iter(batches)
    last: tuple[Tensor, Tensor] | None = None
    while True:
        batch = next(remaining, None)
        shape = (0, 0, 0, 0) if batch is None else batch[0].shape
        longest = torch.tensor(shape, device=device)  # [4]
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        if not longest[0]:
            return
        if batch is None and last is None:
            last = (
                torch.zeros(longest.tolist(), device=device),
                torch.zeros(int(longest[0]), dtype=torch.int64, device=device),
            )
        last = batch or last
        assert last is not None
        yield last, batch is not None
