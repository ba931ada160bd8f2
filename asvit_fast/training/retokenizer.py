"""Re-tokenization in any training loop: which reduction an epoch has, and nothing left to compile when it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..modes import restored_modes
from .rng import preserved_random_state
from .schedule import RetokenizationSchedule
from .token_reduction import set_token_reduction, token_reduction, unsupported_reason

Images = Tensor | Callable[[int], Tensor]
Context = AbstractContextManager[Any] | Callable[[], AbstractContextManager[Any]]
RUNS = {"cuda": 2}  # of a warm-up at each reduction: CUDA graphs are recorded in the second


class Retokenizer:
    """Progressive re-tokenization (As-ViT, arXiv 2202.11921, section 3.4) of a network in any training loop: call
    ``step(epoch)`` before each epoch.

    Weights, optimizer, average of the weights, GradScaler and learning rate stay what they are: only stride and
    dilation of the first projection change.

    Args:
        model: a network that ``set_token_reduction`` takes, plain, compiled, in DistributedDataParallel or FSDP2.
        schedule: a RetokenizationSchedule or its text.
        others: networks to switch with it, such as a ModelEmaV3.
        epochs: length of the training, which named schedules and fractions stretch to.

    Raises:
        InputError: a schedule that cannot be used, or a model whose tokens cannot be reduced (unless the schedule has
            full tokens only, with which every model can be trained).

    Examples:
        >>> import timm, asvit_fast as af
        >>> model = timm.create_model("asvit_seed", img_size=64, num_classes=10)
        >>> retokenizer = af.Retokenizer(model, "2:4,1:2,3:1")
        >>> for epoch in range(6):
        ...     if retokenizer.step(epoch):  # then the updates of the epoch, as always
        ...         print(f"epoch {epoch}: {retokenizer.reduction} times fewer tokens per side")
        epoch 0: 4 times fewer tokens per side
        epoch 2: 2 times fewer tokens per side
        epoch 3: 1 times fewer tokens per side
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: str | RetokenizationSchedule,
        *others: nn.Module,
        epochs: int | None = None,
    ) -> None:
        schedule = RetokenizationSchedule.parse(schedule)
        self.schedule = schedule if epochs is None else schedule.for_epochs(epochs)
        self.schedule.reduction_at(0)  # fractions of a training of unknown length are a mistake now, not later
        self.model = model
        modules = (model, *others)
        if self.schedule.reductions == (1,):
            self._modules = tuple(module for module in modules if unsupported_reason(module) is None)
        else:
            self._modules = modules
        for module in self._modules:
            token_reduction(module)

    @property
    def reduction(self) -> int:
        """Token reduction of the model now: how many times fewer tokens per side."""
        return token_reduction(self.model) if self.model in self._modules else 1

    def step(self, epoch: int) -> bool:
        """Give all networks the reduction of an epoch, counted from 0; True if that changed one. A millisecond, and no
        tensor changes; under torchrun every rank calls it.

        Raises:
            InputError: a negative epoch.
        """
        return self._set(self.schedule.reduction_at(epoch))

    def _set(self, reduction: int) -> bool:
        changed = any(token_reduction(module) != reduction for module in self._modules)
        if changed:
            for module in self._modules:
                set_token_reduction(module, reduction)
        return changed

    def warmup(self, images: Images, autocast: Context | None = None, evaluate: bool | Context = True) -> None:
        """Run the model once at every reduction of the schedule, forward and backward in training mode and forward in
        evaluation mode, so that no later phase compiles, tunes or runs out of memory: the first epoch starts with all
        of that behind it. On a GPU twice: ``torch.compile(model, mode="reduce-overhead")`` records its CUDA graphs in
        the second run.

        Gradients, random states (torch on the CPU and the images' device, Python, NumPy), buffers such as those of
        BatchNorm, training flags and the reduction are left as they were. Every rank of a distributed training must
        call it.

        torch.compile keeps one graph for each of what it finds different: token reduction, training or evaluation, and
        also shape and type of the images, autocast, gradients on or off. Give the images and the autocast of the
        training. Three reductions in training and evaluation are 6 graphs, and torch._dynamo.config.recompile_limit (8)
        is the most that one function may have before it is no longer compiled; another batch size, or evaluation under
        both no_grad and inference_mode, counts for each reduction again.

        Args:
            images: [B, 3, H, W] on the model's device, or a function from a reduction to those of its phases.
            autocast: what the training's forward pass runs in, a context manager or a function that makes one.
            evaluate: also run in evaluation mode, in torch.no_grad as ``asvit_fast`` evaluates; or what else the
                evaluation runs in, such as torch.inference_mode.
        """
        before = self.reduction
        with _undisturbed(self.model):
            try:
                for reduction in self.schedule.reductions:
                    self._set(reduction)
                    batch = images(reduction) if callable(images) else images  # [B, 3, H, W]
                    for _ in range(RUNS.get(batch.device.type, 1)):
                        self._run(batch, autocast, torch.no_grad if evaluate is True else evaluate)
            finally:
                self._set(before)

    def _run(self, images: Tensor, autocast: Context | None, evaluate: Literal[False] | Context) -> None:
        with preserved_random_state(images.device):
            self.model.train()
            with _entered(autocast):
                output = self.model(images)
                loss = torch.stack([part.float().mean() for part in _tensors(output)]).sum()
            loss.backward()
            for parameter in self.model.parameters():
                parameter.grad = None
            if evaluate is not False:
                self.model.eval()
                with _entered(evaluate), _entered(autocast):
                    self.model(images)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _entered(context: Context | None) -> AbstractContextManager[Any]:
    if context is None:
        return contextlib.nullcontext()
    return context if isinstance(context, AbstractContextManager) else context()


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put gradients, buffers and training flags back to what they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with restored_modes(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
