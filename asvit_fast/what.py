"""WHAT, as every command and function takes it: a topology, the name of a network, a run, an export, a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_jsonl, read_object
from .models.foreign import is_foreign
from .models.library import check_known, is_known
from .run_directory import CONFIG, TRACE
from .runs import DESIGNS, Run, find_runs, has_run
from .settings import EXPORT_FORMATS
from .topology import NAMED_TOPOLOGIES, Topology
from .training.build import CheckpointModel, build_from_checkpoint, is_export
from .training.checkpoint import BEST, LAST

GRAPHS = (*EXPORT_FORMATS["onnx"], *EXPORT_FORMATS["exported"])
FORMS = (
    "a topology, the name of a model of timm or torchvision, a run directory, an exported folder, or a checkpoint file"
)


@dataclass(frozen=True)
class Target:
    """The network that WHAT names.

    Attributes:
        name: the network's name, None where only its checkpoint knows it.
        options: further arguments of its constructor.
        weights: file or folder that has its weights, None where they are to be drawn.
        run: the search or the scaling that it is the result of.
        foreign: the name is one of ``models.foreign``: hf:NAME or module:function.
    """

    name: str | None
    options: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    run: Run | None = None
    foreign: bool = False

    @property
    def trained(self) -> Path:
        """The place of its weights. Raises InputError when there are none."""
        if self.weights is None:
            name = self.options.get("topology", self.name)
            raise InputError(f"{name} has no trained weights: give a training, an exported folder, or a checkpoint")
        return self.weights

    def load(self, use_ema: bool = False) -> CheckpointModel:
        """The network with its weights. Raises InputError when there are none, or they cannot be read."""
        return build_from_checkpoint(self.trained, use_ema=use_ema)

    @property
    def topology(self) -> Topology:
        """Raises InputError for a network that is no As-ViT."""
        if self.weights is not None:
            built = self.load()
            return _topology(built.name, built.options)
        return _topology(str(self.name), self.options)

    @property
    def fresh(self) -> Topology | str:
        """The network that is to be drawn: the topology that was given or found, or the name."""
        return Topology.parse(self.options["topology"]) if "topology" in self.options else str(self.name)


def resolve(what: str | Path | Topology, *, to_train: bool = False, foreign: bool = False) -> Target:
    """The network that ``what`` names.

    The name of a network comes before a folder of the same name, which ``./NAME`` means. Of a folder that holds a
    search and a scaling, as search/ and scale/, the scaling is meant; with a training beside them, as train/, it must
    be said which, but ``to_train`` the scaling again: the training is then the one that continues. No file that holds
    weights is read yet. ``foreign`` allows hf:NAME and module:function, too.

    Raises:
        InputError: nothing of these, a run that is not finished, a damaged run, a folder of trainings and other runs.
    """
    if isinstance(what, Topology) or "|" in str(what):
        return Target("asvit", {"topology": str(Topology.parse(what if isinstance(what, Topology) else str(what)))})
    if isinstance(what, str) and is_known(what):
        return Target(what)
    if isinstance(what, str) and is_foreign(what):
        if not foreign:
            raise InputError(f"only asvit-fast bench takes {what!r}; give {FORMS}")
        return Target(what, foreign=True)
    if not str(what).strip():
        raise InputError(f"WHAT is empty; give {FORMS}")
    path = Path(str(what).removeprefix("local-dir:"))  # timm's way to name an exported folder
    if path.is_file() or is_export(path) or _is_training(path):
        return Target(None, weights=path)
    if path.is_dir():
        if _is_training(path / "train") and not to_train:
            if not any(has_run(path / kind) for kind in DESIGNS):
                return Target(None, weights=path / "train")
            raise InputError(f"{str(path)!r} holds a training and other runs; give {path / 'train'} or another of them")
        if not to_train and read_object(path / CONFIG).get("kind") == "train":
            begun = read_jsonl(path / TRACE)
            advice = "restore one of them" if begun else "no epoch has ended yet: run the same train command again"
            raise InputError(f"{str(path)!r} holds a training without its checkpoints, {BEST} and {LAST}; {advice}")
        run = _finished(path)
        return Target("asvit", {"topology": str(Topology.parse(run.topology))}, run=run)
    if "/" in str(what) or path.suffix:
        raise InputError(f"{str(what)!r} does not exist; give {FORMS}")
    try:
        check_known(str(what))
    except InputError as error:
        raise InputError(f"{error}; there is no file or folder of that name either") from None
    raise AssertionError("a known name")


def resolve_topology(what: str | Path | Topology) -> Topology:
    """The topology that ``what`` names, as ``resolve``. Raises InputError for a network that is no As-ViT."""
    return resolve(what).topology


def _is_training(path: Path) -> bool:
    return any((path / name).is_file() for name in (BEST, LAST))


def _finished(directory: Path) -> Run:
    """The finished search or scaling in a folder; of both side by side, the scaling."""
    if not any(has_run(folder) for folder in (directory, *(directory / kind for kind in DESIGNS))):
        graphs = [name for name in GRAPHS if (directory / name).is_file()]
        if graphs:
            raise InputError(f"{directory / graphs[0]} runs, but cannot be taken apart; give what it was exported from")
        raise InputError(f"{str(directory)!r} holds neither a run nor an export; give {FORMS}")
    run = find_runs(directory)[-1]
    if run.result is None:
        raise InputError(
            f"the {run.kind} in {str(run.directory)!r} is not finished ({len(run.trace)} steps); "
            f"continue it, or give its topology so far: '{run.topology}'"
        )
    return run


def _topology(name: str, options: dict[str, Any]) -> Topology:
    base = name.partition(".")[0]
    if "topology" in options:
        return Topology.parse(options["topology"])
    if base in NAMED_TOPOLOGIES:
        return Topology.parse(base)
    if base == "asvit":
        return Topology.parse("asvit_seed")  # the default of its constructor
    raise InputError(f"{name} is no As-ViT and has no topology; give one, or {', '.join(NAMED_TOPOLOGIES)}")
