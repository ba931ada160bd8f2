"""The topology of an As-ViT, its text form, and the space that the search draws from.

Source: As-ViT (arXiv 2202.11921), Table 1 and section 3.3; the text form is the one of VITA-Group/AsViT.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    import torch

NUM_STAGES = 4
MAX_DIM = 1024  # widths double from stage to stage up to this cap (the paper's parameter counts include it)
DEFAULT_WIDTH = 32
NAMED_TOPOLOGIES = {  # the search's result and what it was scaled to (Table 4), by their names in timm
    "asvit_seed": "8,2,3|4,1,2|4,1,4|4,1,6|32",
    "asvit_small": "8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88",
    "asvit_base": "8,2,3,3|4,1,2,1|4,1,4,5|4,1,6,2|32,116",
    "asvit_large": "8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180",
}
EMBED_STRIDE = 4  # pixels between two tokens of stage 1 at full resolution

# The widest values a field may take at all. Table 1 is narrower; these bounds only keep nonsense out.
_ALLOWED = {
    "kernel": (1, 64),
    "splits": (1, 256),
    "expansion": (1, 64),
    "depth": (1, 256),
    "heads": (8, 1024),
    "width": (1, 8192),
}


def _check(name: str, value: Any, where: str) -> None:
    low, high = _ALLOWED[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{where}: {name} must be an integer from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class StageSpec:
    """One stage: ``kernel`` of the projection in front of it (pixels for stage 1, tokens later), ``splits`` of the
    feature map per side (windows = splits x splits), FFN ``expansion``, number of blocks ``depth``.

    Examples:
        >>> import asvit_fast as af
        >>> af.Topology.parse("asvit_seed").stages[0]
        StageSpec(kernel=8, splits=2, expansion=3, depth=1)
    """

    kernel: int
    splits: int
    expansion: int
    depth: int = 1

    def __post_init__(self) -> None:
        for name in ("kernel", "splits", "expansion", "depth"):
            _check(name, getattr(self, name), "stage")


@dataclass(frozen=True)
class Topology:
    """A complete architecture: four stages, the heads of the final stage and the width (channels) of the first.

    Heads double from stage to stage like the width does, so stage i (1..4) has ``heads / 2**(4 - i)`` of them.
    Raises InputError, naming field, value and allowed range.

    Examples:
        >>> import asvit_fast as af
        >>> topology = af.Topology.parse("8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88")
        >>> topology.heads, topology.width, [stage.depth for stage in topology.stages]
        (32, 88, [3, 1, 4, 2])
        >>> str(topology) == str(af.Topology.parse("asvit_small"))
        True
    """

    stages: tuple[StageSpec, StageSpec, StageSpec, StageSpec]
    heads: int
    width: int = DEFAULT_WIDTH

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if len(self.stages) != NUM_STAGES:
            raise InputError(f"topology: stages must number {NUM_STAGES}, got {len(self.stages)}")
        for index, stage in enumerate(self.stages, start=1):
            stride, layer = (EMBED_STRIDE, "the first projection") if index == 1 else (2, "patch merging")
            if stage.kernel < stride:
                raise InputError(
                    f"topology, stage {index}: kernel must be an integer from {stride} to {_ALLOWED['kernel'][1]} "
                    f"({layer} has stride {stride}), got {stage.kernel}"
                )
        _check("heads", self.heads, "topology")
        _check("width", self.width, "topology")
        if self.heads % 8:
            raise InputError(
                f"topology: heads must be a multiple of 8 (stage 1 has an eighth of them), got {self.heads}"
            )
        for index, (dim, heads) in enumerate(zip(self.dims, self.stage_heads, strict=True), start=1):
            if dim < heads:
                raise InputError(
                    f"topology, stage {index}: {heads} heads need at least {heads} channels, got {dim}; "
                    f"raise width ({self.width}) or lower heads ({self.heads})"
                )

    @classmethod
    def parse(cls, text: str | Topology, width: int = DEFAULT_WIDTH) -> Topology:
        """Read ``K,S,E[,L]|K,S,E[,L]|K,S,E[,L]|K,S,E[,L]|heads[,width]``, or a name of Table 4, ``asvit_small``.

        As the authors read it: if any stage lacks its depth L, all depths are 1, with a warning if others have one. A
        missing width is ``width``.
        Raises InputError, naming what is wrong with the text.
        """
        if isinstance(text, Topology):
            return text
        if not isinstance(text, str):
            raise InputError(f"topology: expected a string, got {type(text).__name__}")
        text = NAMED_TOPOLOGIES.get(text.strip().partition(".")[0], text)  # timm adds a tag to a name: .untrained
        form = "expected 'K,S,E[,L]' for each of 4 stages and 'heads[,width]', separated by '|'"
        groups = text.strip().split("|")
        if len(groups) != NUM_STAGES + 1:
            names = f", or one of {', '.join(NAMED_TOPOLOGIES)}" if len(groups) == 1 else ""
            raise InputError(f"topology {text!r}: {form}{names}; got {len(groups)} instead of {NUM_STAGES + 1} groups")
        numbers: list[list[int]] = []
        for index, group in enumerate(groups, start=1):
            try:
                numbers.append([int(number) for number in group.split(",")])
            except ValueError:
                raise InputError(f"topology {text!r}: group {index} ({group!r}) must hold integers only") from None
        for index, values in enumerate(numbers[:-1], start=1):
            if len(values) not in (3, 4):
                raise InputError(f"topology {text!r}: {form}; stage {index} has {len(values)} numbers")
        if len(numbers[-1]) not in (1, 2):
            raise InputError(f"topology {text!r}: {form}; the last group has {len(numbers[-1])} numbers")
        has_depths = all(len(values) == 4 for values in numbers[:-1])
        missing = next((index for index, values in enumerate(numbers[:-1], start=1) if len(values) == 3), None)
        if missing is not None and any(len(values) == 4 for values in numbers[:-1]):
            warnings.warn(
                f"topology {text!r}: all depths are 1, as stage {missing} has none (K,S,E,L): give all or none",
                stacklevel=2,
            )
        stages = []
        try:
            for values in numbers[:-1]:
                stages.append(StageSpec(*values) if has_depths else StageSpec(*values[:3]))
            return cls(tuple(stages), *[*numbers[-1], width][:2])  # type: ignore[arg-type]
        except InputError as error:
            problem = str(error).replace("stage:", f"stage {len(stages) + 1}:", 1)
            raise InputError(
                f"topology {text!r}: {problem.removeprefix('topology, ').removeprefix('topology: ')}"
            ) from None

    def __str__(self) -> str:
        """The long form, with depths and width; ``parse`` reads it back."""
        stages = "|".join(f"{s.kernel},{s.splits},{s.expansion},{s.depth}" for s in self.stages)
        return f"{stages}|{self.heads},{self.width}"

    @property
    def seed_string(self) -> str:
        """The short form, without depths and width: what the search finds."""
        return "|".join(f"{s.kernel},{s.splits},{s.expansion}" for s in self.stages) + f"|{self.heads}"

    @property
    def depths(self) -> tuple[int, int, int, int]:
        return tuple(stage.depth for stage in self.stages)  # type: ignore[return-value]

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Channels of each stage."""
        return tuple(min(MAX_DIM, self.width * 2**i) for i in range(NUM_STAGES))

    @property
    def features(self) -> int:
        """Channels of the final stage, the length of ``score_features``."""
        return self.dims[-1]

    @property
    def stage_heads(self) -> tuple[int, int, int, int]:
        return tuple(self.heads // 2 ** (NUM_STAGES - 1 - i) for i in range(NUM_STAGES))

    def replace(self, *, depths: Sequence[int] | None = None, width: int | None = None) -> Topology:
        """The same topology with other depths and/or another width."""
        stages = self.stages
        if depths is not None:
            if len(depths) != NUM_STAGES:
                raise InputError(f"topology: depths must number {NUM_STAGES}, got {len(depths)}")
            stages = tuple(replace(s, depth=d) for s, d in zip(stages, depths, strict=True))  # type: ignore[assignment]
        return Topology(stages, self.heads, self.width if width is None else width)


# Table 1 in the authors' order of dimensions, with their key for each (VITA-Group/AsViT, SEARCH_SPACE).
_TABLE_1: dict[str, tuple[int, ...]] = {
    "K1": (4, 5, 6, 7, 8),
    "K2": (2, 3, 4),
    "K3": (2, 3, 4),
    "K4": (2, 3, 4),
    "S1": (2, 4, 8),
    "S2": (1, 2, 4),
    "S3": (1, 2),
    "E1": (2, 3, 4, 5, 6),
    "E2": (2, 3, 4, 5, 6),
    "E3": (2, 3, 4, 5, 6),
    "E4": (2, 3, 4, 5, 6),
    "heads": (16, 32, 64),
}


@dataclass(frozen=True)
class SearchSpace:
    """The product of independent choices that a search draws from; by default Table 1 of the paper (4,556,250
    topologies).

    Keys: K1..K4 kernels, S1..S3 splits (the final stage is never split), E1..E4 FFN expansions, heads of the final
        stage.

    Examples:
        >>> import asvit_fast as af
        >>> af.SearchSpace().size
        4556250
    """

    dimensions: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(_TABLE_1))

    def __post_init__(self) -> None:
        if set(self.dimensions) != set(_TABLE_1):
            raise InputError(
                f"search space: dimensions must be {', '.join(_TABLE_1)}; got {', '.join(self.dimensions)}"
            )
        ordered = {name: tuple(self.dimensions[name]) for name in _TABLE_1}
        for name, choices in ordered.items():
            if not choices or len(set(choices)) != len(choices):
                raise InputError(f"search space: {name} needs one or more different choices, got {choices}")
        object.__setattr__(self, "dimensions", ordered)
        for name, choices in ordered.items():  # every single choice must make a valid topology
            for index in range(len(choices)):
                self.topology([index if other == name else 0 for other in ordered], width=MAX_DIM)

    def __hash__(self) -> int:
        return hash(tuple(self.dimensions.items()))

    @property
    def size(self) -> int:
        return math.prod(len(choices) for choices in self.dimensions.values())

    @property
    def entropy(self) -> float:
        """Entropy of the uniform policy, in nats (15.33 for Table 1)."""
        return math.log(self.size)

    def narrow(self, **choices: Sequence[int]) -> SearchSpace:
        """The same space with fewer (or other) choices, e.g. ``narrow(K1=(8,), heads=(16, 32))``."""
        unknown = set(choices) - set(self.dimensions)
        if unknown:
            raise InputError(
                f"search space: unknown dimension {', '.join(sorted(unknown))}; one of {', '.join(self.dimensions)}"
            )
        return SearchSpace({**self.dimensions, **{name: tuple(values) for name, values in choices.items()}})

    def topology(self, action: Sequence[int], width: int = DEFAULT_WIDTH) -> Topology:
        """The topology of one index per dimension, in the order of ``dimensions``; depths are 1."""
        if len(action) != len(self.dimensions):
            raise InputError(f"search space: an action has {len(self.dimensions)} indices, got {len(action)}")
        value: dict[str, int] = {}
        for (name, choices), index in zip(self.dimensions.items(), action, strict=True):
            if not 0 <= int(index) < len(choices):
                raise InputError(
                    f"search space: index of {name} must be from 0 to {len(choices) - 1}, got {int(index)}"
                )
            value[name] = choices[int(index)]
        return self.topology_of(value, width)

    def topology_of(self, value: Mapping[str, int], width: int = DEFAULT_WIDTH) -> Topology:
        """The topology with a value for each dimension; depths are 1."""
        stages = tuple(
            StageSpec(value[f"K{i}"], value.get(f"S{i}", 1), value[f"E{i}"]) for i in range(1, NUM_STAGES + 1)
        )
        return Topology(stages, value["heads"], width)  # type: ignore[arg-type]

    @staticmethod
    def choices_of(topology: Topology) -> dict[str, int]:
        """The value of a topology in each dimension; S4, which is none, is left out."""
        value: dict[str, int] = {"heads": topology.heads}
        for index, stage in enumerate(topology.stages, start=1):
            value |= {f"K{index}": stage.kernel, f"S{index}": stage.splits, f"E{index}": stage.expansion}
        value.pop("S4")
        return value

    def sample(self, generator: torch.Generator | None = None, width: int = DEFAULT_WIDTH) -> Topology:
        """A topology drawn uniformly."""
        import torch  # here: the command line reads topologies without it

        action = [int(torch.randint(len(choices), (), generator=generator)) for choices in self.dimensions.values()]
        return self.topology(action, width)

    def enumerate(self, width: int = DEFAULT_WIDTH) -> Iterator[Topology]:
        """Every topology of the space, the last dimension changing fastest."""
        for action in itertools.product(*(range(len(choices)) for choices in self.dimensions.values())):
            yield self.topology(action, width)

    def __contains__(self, topology: object) -> bool:
        if not isinstance(topology, Topology):
            return False
        value = self.choices_of(topology)
        return topology.stages[-1].splits == 1 and all(
            value[name] in choices for name, choices in self.dimensions.items()
        )
