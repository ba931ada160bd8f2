"""timm's scripts, unchanged, with this package's models and re-tokenization.

    python -m asvit_fast.timm train.py DATA --model asvit_small --epochs 300 --retokenize 40:4,30:2,230:1 ...
    torchrun --nproc-per-node 8 -m asvit_fast.timm train.py DATA ...
    python -m asvit_fast.timm validate.py DATA --model asvit_small --checkpoint FILE

Runs SCRIPT with ARGS as ``python SCRIPT ARGS`` would, with asvit_fast imported: timm then knows its models. The only
option that is not the script's is ``--retokenize`` (As-ViT, arXiv 2202.11921, section 3.4): epochs and the reduction
of tokens per side during them, for every model that ``set_token_reduction`` knows, ours or timm's.
"""

from __future__ import annotations

import contextlib
import functools
import math
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.scheduler
import timm.utils
from torch import nn

from ..errors import EXIT_INPUT, InputError
from ..tokens import tokens_text
from .retokenizer import Retokenizer
from .schedule import RetokenizationSchedule
from .schedule_cost import schedule_cost
from .token_reduction import token_reduction

PROGRAM = "asvit_fast.timm"
OPTION = "--retokenize"
AVERAGES: dict[Any, str] = {
    timm.utils.ModelEmaV3: "module",
    timm.utils.ModelEmaV2: "module",
    timm.utils.ModelEma: "ema",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script; 0, or 2 after a mistake that is reported in one line. The script's own exits pass through."""
    try:
        arguments, text = _take_option(sys.argv[1:] if argv is None else argv)
        if not arguments or arguments[0].startswith("-"):
            raise InputError(f"no script given: python -m {PROGRAM} SCRIPT ARGS, for instance timm's train.py")
        schedule = None if text is None else RetokenizationSchedule.parse(text)
        with _as_program(arguments):
            if schedule is None:
                runpy.run_path(arguments[0], run_name="__main__")
            else:
                _Listener(schedule).run(arguments[0])
    except InputError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_INPUT
    return 0


def _take_option(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without ours, and its value if it is there."""
    rest, values = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
        else:
            values.append(value if equals else next(words, ""))
    if len(values) > 1:
        raise InputError(f"{OPTION} is given {len(values)} times: {' and '.join(values)}; give it once")
    return rest, values[0] if values else None


@contextlib.contextmanager
def _as_program(arguments: list[str]) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as the script expects them."""
    script = Path(arguments[0])
    if not script.is_file():
        raise InputError(f"there is no script {script}: timm's are in the folder of its sources, not in its package")
    folder, ours = script.resolve().parent, Path(timm.__file__).resolve().parent
    if (folder / "timm").is_dir() and folder / "timm" != ours:
        _print_on_rank0(f"{script.name} runs with timm {timm.__version__} of {ours}, not with the one beside it")
    before = sys.argv, sys.path
    sys.argv, sys.path = list(arguments), [str(folder), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = before


class _Listener:
    """Learns from a script's calls of timm which model it trains, the copies of it and the epoch; follows the schedule.

    The epoch comes from the learning rate scheduler: the scripts of all versions tell it the number of the epoch that
    comes next, when they resume and after each validation. Data sets and samplers hear of epochs in some cases only.
    """

    def __init__(self, schedule: RetokenizationSchedule) -> None:
        self.schedule = schedule
        self.created: list[nn.Module] = []
        self.copies: list[tuple[nn.Module, nn.Module]] = []  # what was copied, and its copy
        self.img_size: tuple[int, int] | None = None
        self.trained: list[nn.Module] = []
        self.epoch: int | None = None  # the last that the script told
        self.retokenizer: Retokenizer | None = None

    def run(self, script: str) -> None:
        """The script from start to end. InputError if nothing was re-tokenized."""
        with contextlib.ExitStack() as stack:
            for function, hear in (
                (timm.create_model, self._hear_model),
                (timm.data.create_loader, self._hear_loader),
                (timm.scheduler.create_scheduler_v2, self._hear_scheduler),
            ):
                for module in _modules_with(function):
                    stack.enter_context(_replaced(module, function.__name__, _heard(function, hear)))
            saver = timm.utils.CheckpointSaver
            stack.enter_context(_replaced(saver, "save_checkpoint", self._ranked(saver.save_checkpoint)))
            for average in AVERAGES:
                stack.enter_context(_replaced(average, "__init__", _heard(average.__init__, self._hear_average)))
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                if end.code in (None, 0):
                    self._check_end(script)
                raise
            self._check_end(script)

    # ----------------------------------------------------------------------- what is heard: result, then arguments

    def _hear_model(self, model: nn.Module, *_: Any, scriptable: bool | None = None, **__: Any) -> nn.Module:
        if scriptable:
            raise InputError(f"{OPTION} cannot change the tokens of a TorchScript: leave --torchscript out")
        if not self.created and self.schedule.reductions != (1,):
            token_reduction(model)  # the first is the one to train: refused, if it must be, before data is read
        self.created.append(model)
        return model

    def _hear_loader(self, loader: Any, *_: Any, input_size: Any = None, is_training: bool = False, **__: Any) -> Any:
        if is_training and isinstance(input_size, (tuple, list)):
            self.img_size = (input_size[-2], input_size[-1])
        return loader

    def _hear_average(self, nothing: None, average: Any, model: nn.Module, *_: Any, **__: Any) -> None:
        attribute = next(name for kind, name in AVERAGES.items() if isinstance(average, kind))
        self.copies.append((model, getattr(average, attribute)))
        if self.retokenizer is not None:
            self._follow()

    def _hear_scheduler(
        self,
        result: tuple[Any, int],
        optimizer: Any,
        *_: Any,
        step_on_epochs: bool = True,
        updates_per_epoch: int = 0,
        **__: Any,
    ) -> tuple[Any, int]:
        scheduler, epochs = result
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.trained = [model for model in self.created if any(id(weight) in held for weight in model.parameters())]
        if not self.trained:
            raise InputError(f"{OPTION}: the script's optimizer trains no model that timm.create_model has made")
        self.schedule = self.schedule.for_epochs(epochs)
        self._follow()
        _print_on_rank0(
            f"{OPTION} {self.schedule}\n{schedule_cost(self.trained[0], self.schedule, self.img_size or 224).table()}"
        )
        scheduler = _Untouched() if scheduler is None else scheduler
        scheduler.__class__ = _telling(type(scheduler), self._tell, 0 if step_on_epochs else updates_per_epoch)
        return scheduler, epochs

    def _ranked(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """``CheckpointSaver.save_checkpoint``, for which finer tokens beat any metric of coarser ones, whose weights do
        best on their own grid. What a saver remembers of earlier phases, or of a run that it resumes, gives way."""

        @functools.wraps(save)
        def call(saver: Any, epoch: int, metric: float | None = None, *arguments: Any, **options: Any) -> Any:
            worst = math.inf if saver.decreasing else -math.inf
            best = saver.best_epoch
            if self.retokenizer is not None and best is not None and metric is not None:
                now, before = self.schedule.reduction_at(epoch), self.schedule.reduction_at(best)
                if now < before:
                    saver.best_metric = saver.best_epoch = None
                    saver.checkpoint_files = [(file, worst) for file, _ in saver.checkpoint_files]
                elif now > before:
                    metric = worst
            return save(saver, epoch, metric, *arguments, **options)

        return call

    # ----------------------------------------------------------------------- what follows from it

    def _follow(self) -> None:
        """Let the trained model and all its copies have the tokens of the epoch from now on."""
        copies = [
            copy
            for source, copy in self.copies
            if any(module is model for module in source.modules() for model in self.trained)
        ]
        self.retokenizer = Retokenizer(self.trained[0], self.schedule, *self.trained[1:], *copies)
        self.retokenizer.step(self.epoch or 0)

    def _tell(self, epoch: int) -> None:
        """The script says which epoch comes next."""
        assert self.retokenizer is not None
        if self.retokenizer.step(epoch):
            _print_on_rank0(f"from epoch {epoch} on (counted from 0) {tokens_text(self.retokenizer.reduction)}")
        self.epoch = epoch

    def _check_end(self, script: str) -> None:
        reason = None
        if not self.created:
            reason = "made no model with timm.create_model"
        elif self.retokenizer is None:
            reason = "made no scheduler with timm.scheduler.create_scheduler_v2"
        elif self.epoch is None:
            reason = "told its scheduler no epoch (or was stopped in the first one)"
        if reason is not None:
            raise InputError(f"{OPTION} has not followed the schedule: {script} {reason}")


class _Untouched:
    """Stands for the scheduler that ``--sched none`` does without: leaves the learning rate as it is."""

    t_in_epochs = True

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Do nothing."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Do nothing."""


def _telling(kind: Any, tell: Callable[[int], None], updates_per_epoch: int) -> type:
    """A class of schedulers that also tell the number of the epoch that comes next.

    ``updates_per_epoch``: of scripts that step by updates (--sched-on-updates), else 0. Those that resume say nothing
    but how many updates there have been, before any of their own.
    """
    updated = updates_per_epoch == 0

    class Telling(kind):
        def step(self, epoch: int, *arguments: Any, **options: Any) -> None:
            super().step(epoch, *arguments, **options)
            tell(epoch)

        def step_update(self, num_updates: int, *arguments: Any, **options: Any) -> None:
            super().step_update(num_updates, *arguments, **options)
            nonlocal updated
            if not updated and num_updates % updates_per_epoch == 0:
                tell(num_updates // updates_per_epoch)
            updated = True

    Telling.__name__, Telling.__qualname__ = kind.__name__, kind.__qualname__
    return Telling


def _heard(function: Callable[..., Any], hear: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function: what ``hear`` makes of its result and arguments is returned."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return hear(function(*arguments, **options), *arguments, **options)

    return call


def _modules_with(function: Callable[..., Any]) -> list[Any]:
    """The modules of timm that have the function, from where scripts import it."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "timm"]
    return [module for module in modules if vars(module).get(function.__name__) is function]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _print_on_rank0(line: str) -> None:
    """Print on standard error, as the scripts log; by one process."""
    if timm.utils.world_info_from_env()[1] == 0:
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)
