"""The cost of a re-tokenization schedule and what it saves, shown before training starts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..cost import count_macs
from ..settings import ImageSize
from .schedule import RetokenizationSchedule
from .token_reduction import set_token_reduction, token_reduction, unsupported_reason


@dataclass(frozen=True)
class ScheduleCost:
    """Cost of every phase of a schedule.

    ``macs``: multiply-adds of one image in one forward pass, by token reduction; full tokens (1) are always there.
    ``phase_savings``: the part of a phase's multiply-adds that its reduction saves, 0 to 1, one for each phase.
    ``saving``: the same of the whole training.
    """

    schedule: RetokenizationSchedule
    macs: dict[int, int]

    @property
    def phase_savings(self) -> tuple[float, ...]:
        """1 - multiply-adds / multiply-adds with full tokens, for each phase."""
        return tuple(1 - self.macs[phase.reduction] / self.macs[1] for phase in self.schedule.phases)

    @property
    def saving(self) -> float:
        """The part of the whole training's multiply-adds that is saved, 0 to 1."""
        lengths = [phase.length for phase in self.schedule.phases]
        saved = sum(length * saving for length, saving in zip(lengths, self.phase_savings, strict=True))
        return saved / sum(lengths)

    def table(self) -> str:
        """The phases with their multiply-adds per image and savings, as text."""
        lines = [f"{'epochs':>12}  {'fewer tokens per side':>21}  {'multiply-adds per image':>23}  {'saving':>7}"]
        for title, phase, saving in zip(self._titles(), self.schedule.phases, self.phase_savings, strict=True):
            factor = f"{phase.reduction} x"
            macs = f"{self.macs[phase.reduction] / 1e9:.3g} G"
            lines.append(f"{title:>12}  {factor:>21}  {macs:>23}  {saving:>7.1%}")
        return "\n".join([*lines, f"{'all':>12}  {'':>21}  {'':>23}  {self.saving:>7.1%}"])

    def _titles(self) -> list[str]:
        """Epochs, counted from 0 as everywhere, or fractions of the training."""
        phases = self.schedule.phases
        if self.schedule.epochs is None:
            return [f"{phase.length:.1%}" for phase in phases]
        ends = [*self.schedule.starts[1:], self.schedule.epochs]
        return [f"{start}-{end - 1}" for start, end in zip(self.schedule.starts, ends, strict=True)]


def schedule_cost(model: nn.Module, schedule: str | RetokenizationSchedule, img_size: ImageSize = 224) -> ScheduleCost:
    """Multiply-adds per image of ``model`` at every reduction of ``schedule``, by ``asvit_fast.cost.count_macs``,
    and what the schedule saves.

    Args:
        model: an As-ViT or a model that ``set_token_reduction`` takes; its reduction is left as it was.
        img_size: pixels, int or (height, width).

    Raises:
        InputError: a schedule or size that cannot be used, or a model whose tokens cannot be reduced.
    """
    schedule = RetokenizationSchedule.parse(schedule)
    if schedule.reductions == (1,) and unsupported_reason(model) is not None:
        return ScheduleCost(schedule, {1: count_macs(model, img_size)})
    before = token_reduction(model)
    try:
        macs = {}
        for reduction in sorted({1, *schedule.reductions}):
            set_token_reduction(model, reduction)
            macs[reduction] = count_macs(model, img_size)
    finally:
        set_token_reduction(model, before)
    return ScheduleCost(schedule, macs)
