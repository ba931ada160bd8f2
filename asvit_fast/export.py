"""Networks as files for others: folders that ``timm.create_model("local-dir:...")`` loads, ONNX, torch.export."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn

from . import graph
from ._version import __version__
from .cost import params
from .errors import InputError, one_line
from .files import folder_path, read_object, write_folder
from .model_card import CARD, is_ours, model_card, run_facts, write_card
from .models.library import takes_size
from .runs import Run, has_run, read_run
from .settings import EXPORT_FORMATS, ImageSize, check_choice
from .topology import Topology
from .training.build import CONFIG_FILE, WEIGHTS_FILE, CheckpointModel, build, constructor_arguments
from .training.description import CONFIGURATION, checked
from .what import resolve

What = str | Path | Topology | nn.Module
MARK = "asvit_fast"  # the entry of config.json that says who wrote it
DATA = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


@dataclass(frozen=True)
class Exported:
    """A network that is written.

    Attributes:
        built: the network, and how its images are prepared.
        trained: whether its weights are trained.
        run: the search, scaling or training that it is the result of, None where it is of none.
        earlier: what an earlier export, which this is one of, says of itself in its configuration.
    """

    built: CheckpointModel
    trained: bool
    run: Run | None = None
    earlier: Mapping[str, Any] | None = None

    @property
    def limit(self) -> float | None:
        """Most parameters that the run allowed, None where it is of none that has a limit."""
        return None if self.run is None else limit_of(self.run)

    @property
    def weights(self) -> str:
        """Where the weights are from, in words."""
        if self.earlier is not None and isinstance(text := self.earlier.get("weights"), str):
            return text
        return "fresh, not trained" if not self.trained else f"of {self.built.path.name or 'the network in memory'}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the model card says of the run behind it."""
        if self.run is not None:
            return run_facts(self.run)
        facts = {} if self.earlier is None else self.earlier.get("facts")
        return facts if isinstance(facts, dict) and all(map(_is_text, facts.values())) else {}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return params(self.built.model)

    @property
    def labels(self) -> Any:
        """Names of the classes as timm has them: a list, or by number where some have none."""
        names = self.built.label_names
        if isinstance(names, (list, tuple)) and "" in names:
            return {str(number): name for number, name in enumerate(names) if name}
        return names

    def metadata(self) -> dict[str, Any]:
        """The preprocessing that the network expects, in timm's names."""
        config = self.built.data_config()
        metadata = {"architecture": self.built.name, **{name: config[name] for name in DATA}}
        return metadata if self.labels is None else {**metadata, "label_names": self.labels}


def export(
    what: What,
    to: str | Path,
    seed: int = 0,
    num_classes: int | None = None,
    img_size: ImageSize | None = None,
    use_ema: bool = False,
    format: str = "timm",
    push_to_hub: str = "",
) -> Path:
    """Write a network into the folder ``to`` and return its path.

    ``what`` is a topology or its string, a name that timm knows, or a run directory of search or scaling (its final
    topology; of both side by side, the scaled one): the weights are freshly initialised from ``seed``, float32, not
    trained. ``img_size`` is a side, or height and width, in pixels, by default the run's, else 224; ``num_classes`` is
    1000 by default, 0 leaves the classifier out.

    A network in memory is built anew from its name and arguments, its weights copied: an accelerated one is written as
    its package has it, and stays accelerated.

    Of a training (its run directory, a checkpoint) or of an earlier export, the weights there are written, with
    ``use_ema`` their moving average; classes and size are then those of the training.

    Formats, each with the preprocessing that validation had (size, crop, interpolation, mean, standard deviation) and
    the names of the classes:

    - "timm": ``config.json`` and ``model.safetensors``. After ``import asvit_fast``,
      ``timm.create_model(f"local-dir:{to}", pretrained=True)`` is the network, and
      ``timm.data.resolve_model_data_config(model)`` its preprocessing.
    - "onnx": ``model.onnx``, images [batch, C, H, W] of any batch -> logits; run in ONNX Runtime where it is installed,
      and compared. Preprocessing is in the file's metadata, as JSON.
    - "exported": ``model.pt2``, a program of torch.export in torch's own operations, for any batch:
      ``torch.export.load(...).module()``, without asvit_fast. Preprocessing is its extra file ``asvit_fast.json``.

    Beside them ``README.md``, a model card: topology, scores, schedule, accuracy, the commands of the run, and how to
    load it. ``push_to_hub``, "OWNER/NAME", also uploads the format "timm" to the Hugging Face Hub, with the token of
    ``hf auth login`` or ``HF_TOKEN``.

    A kill leaves either what was there or all of the new. Raises InputError when there is no finished run, valid
    topology or checkpoint, when ``to`` holds anything but earlier exports (one of the same format is replaced), for a
    package that is missing, for a network that cannot be written in this format, and when writing fails.
    """
    write = writer(format, to, push_to_hub)
    return write(open_network(what, seed, num_classes, img_size, use_ema))


def writer(format: str, to: str | Path, push_to_hub: str = "") -> Callable[[Exported], Path]:
    """A function that writes networks in this format into this folder. Raises InputError now for what cannot work."""
    check_choice("format", format, tuple(EXPORT_FORMATS))
    if push_to_hub:
        _check_hub(push_to_hub, format)
    if format == "onnx":
        graph.require(("onnx", "onnxscript"), "export in the format onnx")
    target = folder_path(to, "to")
    _check_target(target)

    formats = [one for one, files in EXPORT_FORMATS.items() if one == format or (target / files[0]).is_file()]

    def write(source: Exported) -> Path:
        card = model_card(source.built, source.weights, source.facts, formats, Path(target.resolve().name))

        def fill(folder: Path) -> None:
            _WRITERS[format](source, folder)
            write_card(card, folder, target.resolve().name)

        write_folder(target, fill, last=EXPORT_FORMATS[format][0])
        if push_to_hub:
            _push(source, card, push_to_hub)
        return target

    return write


def open_network(
    what: What, seed: int = 0, num_classes: int | None = None, img_size: ImageSize | None = None, use_ema: bool = False
) -> Exported:
    """The network that ``export`` writes. Raises InputError as it does."""
    if isinstance(what, nn.Module):
        return _of_module(what, num_classes, img_size)
    target = resolve(what)
    if target.weights is not None:
        return _as_it_is(target.load(use_ema), repr(str(what)), num_classes, img_size)
    if use_ema:
        raise InputError(f"{what} has no trained weights, and no average of them: leave out use_ema")
    run = target.run
    if run is not None:
        config = checked(run.config, run.directory / CONFIG_FILE, ("img_size",))
        img_size = img_size or config.get("img_size")
    built = _fresh(str(target.name), target.options, seed, num_classes, img_size)
    return Exported(built, False, run)


def _is_text(fact: Any) -> bool:
    return all(isinstance(text, str) for text in (fact if isinstance(fact, list) else [fact]))


def limit_of(run: Run) -> float | None:
    """Most parameters that a run allowed, or None."""
    budget = run.config.get("budget")
    window = run.config.get("max_params") if run.kind == "scale" else budget and budget.get("params")
    return window[1] if isinstance(window, list) and len(window) == 2 else None


def _of_module(model: nn.Module, num_classes: int | None, img_size: ImageSize | None) -> Exported:
    """Built again from its name and arguments, as whoever loads it will do."""
    name, options = constructor_arguments(model)
    classes = getattr(model, "num_classes", None)
    fresh: Any = build(name, options if classes is None else {**options, "num_classes": classes})
    try:
        fresh.load_state_dict(model.state_dict())
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"{name} cannot be built again from its name and arguments: {one_line(error)}") from error
    fresh.pretrained_cfg = {**fresh.pretrained_cfg, **getattr(model, "pretrained_cfg", {})}
    size = options.get("img_size")
    built = CheckpointModel(name, options, {}, None, fresh, Path())
    if size is not None:
        built.data["input_size"] = (built.data_config()["input_size"][0], *to_2tuple(size))
    return _as_it_is(built, name, num_classes, img_size)


def _as_it_is(built: CheckpointModel, name: str, num_classes: int | None, img_size: ImageSize | None) -> Exported:
    size, classes = built.data_config()["input_size"][1:], getattr(built.model, "num_classes", num_classes)
    if img_size is not None and to_2tuple(img_size) != size:
        raise InputError(
            f"{name} is for images of {size[0]}x{size[1]} pixels; leave img_size out: timm takes it when it loads the "
            "export"
        )
    if num_classes not in (None, classes):
        raise InputError(f"{name} has {classes} classes; leave num_classes out")
    folder = built.path.parent
    config = read_object(folder / CONFIG_FILE)
    if has_run(folder) and config.get("kind") == "train":
        return Exported(built, True, read_run(folder, ("train",)))
    earlier = config.get(MARK) if built.path.name == WEIGHTS_FILE else None
    if not isinstance(earlier, dict):
        return Exported(built, True)
    return Exported(built, earlier.get("trained") is not False, earlier=earlier)


def _fresh(
    name: str, options: Mapping[str, Any], seed: int, num_classes: int | None, img_size: ImageSize | None
) -> CheckpointModel:
    size = 224 if img_size is None else img_size
    arguments: dict[str, Any] = dict(options)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if takes_size(name):
        arguments["img_size"] = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, {**arguments, "pretrained": False})
    config = resolve_data_config({}, model=model)  # of training, not of timm's tests at a larger size
    data = {name: config[name] for name in DATA if name != "input_size"}
    built = CheckpointModel(name, arguments, data, None, model, Path())
    built.data["input_size"] = (built.data_config()["input_size"][0], *to_2tuple(size))
    return built


# --------------------------------------------------------------------------- formats


def _write_timm(source: Exported, folder: Path) -> None:
    arguments = _for_timm(source)
    try:
        save_for_hf(source.built.model, str(folder), safe_serialization=True, **arguments)
    except SafetensorError as error:  # a full disk, among others
        raise InputError(f"cannot write {WEIGHTS_FILE}: {error}; free space or choose another folder") from None
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{source.built.name} cannot be written as timm's folder: {one_line(error)}") from error
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors makes files for their owner alone


def _for_timm(source: Exported) -> dict[str, Any]:
    """What timm's functions write into config.json, after the network's own configuration has been set."""
    built, labels = source.built, source.labels
    if not timm.is_model(built.name):
        raise InputError(f"timm has no {built.name} that could load it; export it in the format onnx or exported")
    model: Any = built.model
    own, config = model.pretrained_cfg, built.data_config()
    kept = {name: value for name, value in own.items() if name in CONFIGURATION and not name.startswith("test_")}
    if tuple(own["input_size"][1:]) != tuple(config["input_size"][1:]):
        kept["pool_size"] = None
    model.pretrained_cfg = {**kept, **config, "architecture": built.name, "num_classes": model.num_classes}
    about = {"trained": source.trained, "weights": source.weights, "facts": source.facts}  # for exports of this one
    notes: dict[str, Any] = {MARK: {"version": __version__, "parameters": source.parameters, **about}}
    if labels is not None:  # where the Hub's readers look, and where timm's do
        model.pretrained_cfg["label_names"] = notes["label_names"] = labels
    return {
        "model_config": notes,
        "model_args": {name: value for name, value in built.options.items() if value is not None},
    }


def _check_hub(repository: str, format: str) -> None:
    if format != "timm":
        raise InputError(f"push_to_hub uploads what timm loads: leave out the format {format}, or push_to_hub")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise InputError(f"push_to_hub must be the name of a repository, OWNER/NAME, got {repository!r}")
    if huggingface_hub.get_token() is None:
        raise InputError("push_to_hub needs a token of the Hugging Face Hub: hf auth login, or set HF_TOKEN")


def _push(source: Exported, card: dict[str, Any], repository: str) -> None:
    """Upload the folder that timm loads as ``hf-hub:OWNER/NAME``; a card that is there stays."""
    usage = (
        f"```python\nimport asvit_fast, timm\nmodel = timm.create_model('hf-hub:{repository}', pretrained=True)\n```"
    )
    try:
        push_to_hf_hub(
            source.built.model, repository, model_card={**card, "usage": usage}, safe_serialization=True,
            **_for_timm(source),
        )  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"the Hugging Face Hub does not take {repository!r}: {one_line(error)}") from error


_WRITERS: dict[str, Callable[[Exported, Path], None]] = {
    "timm": _write_timm,
    "onnx": lambda source, folder: graph.save_onnx(source.built.model, folder / "model.onnx", source.metadata()),
    "exported": lambda source, folder: graph.save_program(source.built.model, folder / "model.pt2", source.metadata()),
}


def _check_target(target: Path) -> None:
    """Refuse to put files among somebody else's."""
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot export to {str(target)!r}: it is a file; give a new or empty folder")
    if not target.is_dir():
        return
    ours = {CARD, "model.onnx.data", *itertools.chain(*EXPORT_FORMATS.values())}  # ONNX of over 2 GB is two
    present = {item.name for item in target.iterdir() if not item.name.endswith(".tmp")}  # left by a kill
    others = sorted(present - ours)
    config = read_object(target / CONFIG_FILE)
    if CARD in present and not is_ours(target / CARD):
        others = [CARD]
    if not others and CONFIG_FILE in present and MARK not in config and config.get("architecture") != "asvit":
        others = [CONFIG_FILE]
    if others:
        raise InputError(
            f"cannot export to {str(target)!r}: it holds other files ({others[0]}); give a new or empty folder"
        )
