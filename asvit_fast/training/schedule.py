"""Which token reduction every epoch is trained with (As-ViT, arXiv 2202.11921, section 3.4 and Table 6)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ..errors import InputError
from ..tokens import REDUCTIONS, check_token_reduction

TABLE_6 = {
    "table6-40": ((40, 4), (30, 2), (230, 1)),
    "table6-80": ((80, 4), (60, 2), (160, 1)),
    "table6-120": ((120, 4), (90, 2), (90, 1)),
}
EXPECTED = (
    "epochs:reduction, reductions 1, 2 or 4 times fewer tokens per side, as in '40:4,30:2,230:1', or fractions of the "
    f"training, '0.4:4,0.3:2,0.3:1', or one of {', '.join(TABLE_6)}, or '1' for full tokens all the time"
)


@dataclass(frozen=True)
class Phase:
    """A part of the training with one token reduction.

    ``length``: epochs if it is an integer, a fraction of the training (above 0, at most 1) if it is a float.
    ``reduction``: 1, 2 or 4 times fewer tokens per side.

    Raises:
        InputError: a value out of its range.
    """

    length: int | float
    reduction: int

    def __post_init__(self) -> None:
        check_token_reduction(self.reduction)
        fraction = isinstance(self.length, float) and 0 < self.length <= 1
        epochs = isinstance(self.length, int) and not isinstance(self.length, bool) and self.length >= 1
        if not (fraction or epochs):
            raise InputError(
                f"a phase lasts 1 or more whole epochs, or a fraction of the training above 0 and at most 1; "
                f"got {self.length!r}"
            )

    def __str__(self) -> str:
        return f"{self.length!r}:{self.reduction}"


@dataclass(frozen=True)
class RetokenizationSchedule:
    """Phases of token reductions, coarse ones first as a rule; ``parse`` makes one from text, ``str`` gives it back.

    Args:
        phases: all in epochs, or all in fractions of the training that sum to 1.
        name: of a published schedule. Those and fractions stretch with the training, epochs do not.

    Raises:
        InputError: no phase, epochs mixed with fractions, or fractions that do not sum to 1.

    Examples:
        >>> import asvit_fast as af
        >>> schedule = af.RetokenizationSchedule.parse("40:4,30:2,230:1")
        >>> schedule.reduction_at(0), schedule.reduction_at(50), schedule.reduction_at(299)
        (4, 2, 1)
    """

    phases: tuple[Phase, ...]
    name: str = ""

    def __post_init__(self) -> None:
        lengths = [phase.length for phase in self.phases]
        if not lengths:
            raise InputError(f"a schedule needs a phase: {EXPECTED}")
        if len({type(length) for length in lengths}) > 1:
            raise InputError(f"schedule '{self}' mixes epochs with fractions of the training: use one of them")
        if self._fractions and abs(math.fsum(lengths) - 1) > 1e-6:
            raise InputError(f"the fractions of schedule '{self}' sum to {math.fsum(lengths):g}, they must sum to 1")

    @classmethod
    def parse(cls, schedule: str | RetokenizationSchedule) -> RetokenizationSchedule:
        """The schedule of a text: "40:4,30:2,230:1" (epochs:reduction per side), fractions of the training
        "0.4:4,0.3:2,0.3:1", "1" for full tokens all the time, or a row of the paper's Table 6 by name: "table6-40",
        "table6-80", "table6-120", which are 300 epochs long. A schedule stays itself.

        Raises:
            InputError: a text of another form, naming the mistake and the form.
        """
        if isinstance(schedule, RetokenizationSchedule):
            return schedule
        if not isinstance(schedule, str):
            raise InputError(f"schedule must be a text, got {schedule!r}; expected {EXPECTED}")
        text = schedule.strip()
        if text in TABLE_6:
            return cls(tuple(Phase(*phase) for phase in TABLE_6[text]), text)
        if text in map(str, REDUCTIONS):
            return cls((Phase(1.0, int(text)),))
        try:
            return cls(tuple(_phase(part) for part in text.split(",")))
        except InputError as error:
            raise InputError(f"schedule {schedule!r}: {error}; expected {EXPECTED}") from None

    def __str__(self) -> str:
        if self.name or (self._fractions and len(self.phases) == 1):
            return self.name or str(self.phases[0].reduction)
        return ",".join(map(str, self.phases))

    @property
    def _fractions(self) -> bool:
        return isinstance(self.phases[0].length, float)

    @property
    def epochs(self) -> int | None:
        """Length of the training; None for fractions, which ``for_epochs`` makes epochs of."""
        return None if self._fractions else int(self._ends[-1])

    @property
    def _ends(self) -> list[int | float]:
        return list(itertools.accumulate(phase.length for phase in self.phases))

    @property
    def reductions(self) -> tuple[int, ...]:
        """The distinct reductions in the order of their first phases."""
        return tuple(dict.fromkeys(phase.reduction for phase in self.phases))

    @property
    def starts(self) -> tuple[int, ...]:
        """First epoch (from 0) of every phase.

        Raises:
            InputError: several phases in fractions of a training whose length is not known.
        """
        if self._fractions and len(self.phases) > 1:
            raise InputError(f"schedule '{self}' is in fractions of the training: say for how many epochs (for_epochs)")
        return (0, *(int(end) for end in self._ends[:-1]))

    def reduction_at(self, epoch: int) -> int:
        """The reduction of an epoch, counted from 0; the last one for ever after the end.

        Raises:
            InputError: a negative epoch, or fractions of a training whose length is not known.
        """
        if epoch < 0:
            raise InputError(f"epochs count from 0, got {epoch}")
        index = sum(start <= epoch for start in self.starts) - 1
        return self.phases[index].reduction

    def for_epochs(self, epochs: int) -> RetokenizationSchedule:
        """Make a schedule of whole epochs for a training of ``epochs``: named schedules and fractions stretch
        (boundaries are rounded), of explicit epochs the last phase is extended.

        Raises:
            InputError: a training shorter than the explicit epochs, or too short for one of the phases.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise InputError(f"a training has 1 or more whole epochs, got {epochs!r}")
        ends = self._ends
        if self._fractions or self.name:
            ends = [math.floor(epochs * end / ends[-1] + 0.5 + 1e-9) for end in ends]  # halves go up
        elif ends[-1] > epochs:
            raise InputError(
                f"schedule '{self}' is {ends[-1]} epochs long but the training has {epochs}: shorten the schedule, or "
                f"give fractions of the training such as '0.4:4,0.3:2,0.3:1'"
            )
        lengths = [int(end - start) for start, end in itertools.pairwise([0, *ends[:-1], epochs])]
        for phase, length in zip(self.phases, lengths, strict=True):
            if length < 1:
                raise InputError(
                    f"schedule '{self}' leaves no epoch for its phase {phase} in a training of {epochs}: train for "
                    f"longer, or give phases in epochs such as '1:4,1:2,3:1'"
                )
        phases = zip(lengths, self.phases, strict=True)
        return RetokenizationSchedule(tuple(Phase(length, phase.reduction) for length, phase in phases))


def _phase(text: str) -> Phase:
    length, colon, reduction = (part.strip() for part in text.partition(":"))
    if not colon or not reduction.isdecimal():
        raise InputError(f"'{text.strip()}' is not epochs:reduction")
    try:
        return Phase(int(length) if length.isdecimal() else float(length), int(reduction))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"'{length}' is not a number") from None
