"""Normalised batches on a device: requests to workers, copies ahead of use, random erasing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from multiprocessing.connection import wait
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ...backends import notify_once
from ...errors import InputError
from ...recipe import Recipe
from .. import rng
from .dataset import Batch, Request, Samples, StreamSamples
from .reader import Reader

PARENT_CHECK_SECONDS = 0.5  # between a worker's looks at the process that it reads for


def make_loader(dataset: Any, reader: Reader[Recipe], classes: int, training: bool) -> MapLoader | StreamLoader:
    """Make what reads this rank's share of a split.

    ``loader(epoch, start, stop, batch_size)`` has the images ``start`` to ``stop`` of its ``images`` in batches, the
    last one smaller: shuffled for each epoch and augmented in training, else in order.
    """
    kind = StreamLoader if isinstance(dataset, IterableDataset) else MapLoader
    return kind(dataset, reader, classes, training)


class RequestSampler(Sampler):
    """Requests to the workers in the coming pass."""

    def __init__(self) -> None:
        self.coming: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.coming


class MapLoader:
    """Batches of a map-style data set: by the main process, or by workers that stay for the next pass."""

    def __init__(self, dataset: Any, reader: Reader[Any], classes: int, training: bool) -> None:
        self.samples = self._samples_of(dataset, reader, classes, training)
        self.reader, self.training = reader, training
        total, rank, ranks = len(self.samples), reader.rank, reader.ranks
        self.images = total // ranks if training else len(range(rank, total, ranks))
        self.requests = RequestSampler()
        self.passes = 0
        self.key = object()  # of the warnings about these images
        self.loader: DataLoader | None = None
        if reader.recipe.workers and self.samples.tensors is None:
            options = {"sampler": self.requests, "persistent_workers": True}
            self.loader = worker_loader(self.samples, reader, reader.recipe.workers, **options)

    def _samples_of(self, dataset: Any, reader: Reader[Any], classes: int, training: bool) -> Samples:
        return Samples(dataset, reader, classes, training)

    def __call__(self, epoch: int, start: int, stop: int, batch_size: int) -> Iterator[Any]:
        total, seed = len(self.samples), self.reader.recipe.seed
        order = rng.epoch_order(total, seed, epoch) if self.training else torch.arange(total)  # [all images]
        # what the ranks read at one time are neighbours in the order
        own = order[self.reader.rank :: self.reader.ranks][start:stop]  # [images]
        requests = ((epoch, piece.tolist()) for piece in own.split(batch_size) if len(piece))  # one empty if none
        if self.loader is None:
            return self._checked(map(self.samples.__getitem__, requests))
        self.requests.coming = requests
        self.passes += 1
        return self._only_latest(self._checked(iter(self.loader)), self.passes)

    def _only_latest(self, batches: Iterator[Batch], number: int) -> Iterator[Batch]:
        while True:
            if number != self.passes:
                raise RuntimeError("these batches were given up when other ones were asked for: workers serve one pass")
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _checked(self, batches: Iterable[Batch | InputError]) -> Iterator[Batch]:
        skipped: dict[str, None] = {}
        for batch in raise_errors(batches):
            before = len(skipped)
            skipped.update(dict.fromkeys(batch.skipped))
            if len(skipped).bit_length() > before.bit_length():  # at once, and when their number has doubled
                notify_once((self.key, len(skipped).bit_length()), skipped_text(list(skipped)))
            yield batch


class StreamLoader:
    """Batches of a data set that is read from its start; workers are new in every pass, their order repeats."""

    def __init__(self, dataset: Any, reader: Reader[Recipe], classes: int, training: bool) -> None:
        self.samples = StreamSamples(dataset, reader, classes, training)
        self.reader, self.workers = reader, max(1, reader.recipe.workers)
        total = getattr(dataset.reader, "num_samples", None)
        if not total:
            raise InputError(
                "this data set does not say how many images it has; give its number in the split's description"
            )
        self.images = int(total) // reader.ranks if training else -(-int(total) // reader.ranks)

    def __call__(self, epoch: int, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        self.samples.epoch = epoch
        for setting, value in (("set_epoch", epoch), ("set_loader_cfg", self.workers)):
            if hasattr(self.samples.dataset, setting):
                getattr(self.samples.dataset, setting)(value)
        generator = rng.generator(self.reader.recipe.seed, epoch)
        loader = worker_loader(self.samples, self.reader, self.workers, generator=generator)
        return rebatch(raise_errors(loader), start, stop, batch_size)


def worker_loader(samples: Any, reader: Reader[Any], workers: int, **options: Any) -> DataLoader:
    """Whole batches from workers. A generator of its own: torch would draw one number of the global one otherwise."""
    options = {"generator": torch.Generator().manual_seed(reader.recipe.seed), **options}
    return DataLoader(
        samples,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_follow_parent,
        pin_memory=reader.device.type == "cuda",
        **options,
    )


def _follow_parent(worker: int) -> None:
    """Ignore SIGINT and SIGTERM of a whole group of processes, which the main process answers by shutting workers down;
    end when that process does or says so, also in the middle of a read that never ends.

    Under a fork server, workers are not its children: nothing else tells them that it has been killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the thread hears it, and from whom
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    child = os.getppid() == parent.pid
    while not wait([parent.sentinel], 0):
        if child and os.getppid() != parent.pid:  # workers that were forked later hold the sentinel open
            break
        if _terminated_by(parent.pid):
            os._exit(0)
    os._exit(1)


def _terminated_by(process: int) -> bool:
    """Wait for a while; return whether the process has sent SIGTERM meanwhile."""
    if not hasattr(signal, "sigtimedwait"):  # SIGTERM ends the worker by itself there
        time.sleep(PARENT_CHECK_SECONDS)
        return False
    heard = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
    return heard is not None and heard.si_pid == process


def raise_errors(batches: Iterable[Batch | InputError]) -> Iterator[Batch]:
    """Yield the batches; an error that came in place of one is raised."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise InputError(str(batch))  # itself would be a cycle of traceback and frame that keeps the workers
        yield batch


def rebatch(chunks: Iterable[Batch], start: int, stop: int, batch_size: int) -> Iterator[Batch]:
    """Images ``start`` to ``stop`` of a stream, re-batched."""
    images = (tuple(part[i] for part in chunk[:3]) for chunk in chunks for i in range(len(chunk.targets)))
    wanted = islice(images, start, stop)
    while piece := list(islice(wanted, batch_size)):
        parts = [torch.stack(part) for part in zip(*piece, strict=True)]
        yield Batch(parts[0], parts[1], parts[2])


def skipped_text(names: list[str]) -> str:
    count = "1 image" if len(names) == 1 else f"{len(names)} images"
    shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"{count} cannot be read so far, each is replaced by the next readable image: {shown}"


class DevicePrefetcher:
    """Batches on the device: float32 ``[b, 3, H, W]``, normalised and erased there, and int64 ``[b]``.

    On CUDA the next batch is copied on a stream of its own while the current one is used; use it on the stream that is
    current when the next one is asked for.
    """

    def __init__(self, reader: Reader[Recipe]) -> None:
        self.device = device = reader.device
        self.mean, self.std = (  # [3, 1, 1], in uint8's units
            torch.tensor(values, device=device).mul(255).view(-1, 1, 1) for values in (reader.mean, reader.std)
        )
        where = device if device.type == "cuda" else "cpu"
        self.erasing = RandomErasing(probability=1.0, mode=reader.recipe.remode, device=where)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        if self.stream is None:
            yield from map(self.put, batches)
            return
        ready = None
        for batch in batches:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # memory given back there is used here
            with torch.cuda.stream(self.stream):
                coming = self.put(batch)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            ready = coming
        if ready is not None:
            yield ready

    def put(self, batch: Any) -> Any:
        images, targets = self._copy(batch.images), self._copy(batch.targets)
        if images.is_floating_point():
            return images.to(torch.float32), targets
        images = images.to(torch.float32).sub_(self.mean).div_(self.std)  # [b, 3, H, W]
        self._erase(images, batch.erase)
        return images, targets

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.stream is not None and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _erase(self, images: Tensor, erase: Tensor) -> None:
        """Each image with the numbers of its own seeds, whatever else is in the batch."""
        chosen = erase.any(1).nonzero().flatten().tolist()  # [b] -> places
        if not chosen:
            return
        with rng.preserved_random_state(self.device):
            for place in chosen:
                words = erase[place].tolist()
                rng.seed_augmentation(words)
                if self.stream is not None:
                    torch.cuda.default_generators[images.get_device()].manual_seed(rng.to_seed(words))
                self.erasing(images[place])
