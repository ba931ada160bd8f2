"""The README.md of an exported network: what it is, how it was found and trained, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme

from ._version import __version__
from .cost import count_macs, params
from .files import as_float
from .run_directory import accuracy, best_row
from .runs import Run
from .settings import EXPORT_FORMATS
from .training.build import CheckpointModel

CARD = "README.md"
MARK = f"<!-- written by asvit-fast export {__version__}: an export into this folder replaces this file -->"
CITATION = """@inproceedings{chen2022asvit,
  title={Auto-scaling Vision Transformers without Training},
  author={Chen, Wuyang and Huang, Wei and Du, Xianzhi and Song, Xiaodan and Wang, Zhangyang and Zhou, Denny},
  booktitle={International Conference on Learning Representations},
  year={2022}
}"""


def write_card(card: dict[str, Any], folder: Path, name: str) -> None:
    """Write a result of ``model_card`` as Markdown with the Hub's header; ``name`` is the title."""
    (folder / CARD).write_text(f"{generate_readme(card, name)}\n{MARK}\n", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Return whether a README.md is a card that ``write_card`` wrote: nobody's work is lost with it."""
    return MARK.partition(__version__)[0] in path.read_text(encoding="utf-8", errors="replace")


def model_card(
    built: CheckpointModel, weights: str, facts: dict[str, Any], formats: list[str], folder: Path
) -> dict[str, Any]:
    """The facts of a network as timm's ``generate_readme`` and ``push_to_hf_hub`` take them.

    Args:
        built: the network, and how its images are prepared.
        weights: where its weights are from, in words.
        facts: of the search, scaling or training that it is the result of, as ``run_facts`` has them.
        formats: the formats in the folder.
        folder: the folder, by the name that whoever loads it will use.
    """
    model: Any = built.model
    config = built.data_config()
    details = {
        "Network": f"{built.name}, {params(model):,} parameters, "
        f"{count_macs(model, config['input_size'][1:]) / 1e9:.3g} G multiply-adds an image, "
        f"{getattr(model, 'num_classes', 'unknown')} classes",
        **({"Topology": f"`{built.options['topology']}`"} if "topology" in built.options else {}),
        "Images": images_text(config),
        "Weights": weights,
        **facts,
    }
    usage = "\n".join(line for format in formats for line in ("```python", *how_to_load(format, folder), "```"))
    return {
        "tags": ["image-classification", "timm"],
        "license": getattr(model, "pretrained_cfg", {}).get("license") or "unknown",
        "description": "An image classifier, written by `asvit-fast export`.",
        "details": details,
        "usage": usage,
        "citation": CITATION,
    }


def images_text(config: dict[str, Any]) -> str:
    """How images are prepared, in a line."""
    channels, height, width = config["input_size"]
    mean, std = (",".join(f"{value:g}" for value in config[name]) for name in ("mean", "std"))
    return (
        f"{channels} x {height} x {width}, crop {config['crop_pct']:g} {config['crop_mode']}, "
        f"{config['interpolation']}, mean {mean}, std {std}"
    )


def how_to_load(format: str, folder: Path) -> list[str]:
    """Lines of Python that load an export."""
    file = folder / EXPORT_FORMATS[format][0]
    if format == "onnx":
        return [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession('{file}')",
            "preprocessing = session.get_modelmeta().custom_metadata_map  # input_size, mean, std, ...: JSON each",
        ]
    if format == "exported":
        return [
            "import torch  # it needs nothing else",
            "preprocessing = {'asvit_fast.json': ''}  # filled in by load, as JSON",
            f"model = torch.export.load('{file}', extra_files=preprocessing).module()",
        ]
    return ["import asvit_fast, timm", f"model = timm.create_model('local-dir:{folder}', pretrained=True)"]


def run_facts(run: Run) -> dict[str, Any]:
    """Scores of a search or a scaling, or schedule, length and accuracy of a training, and the commands of the run."""
    facts = _of_training(run) if run.kind == "train" else _of_design(run)
    commands = list(dict.fromkeys(start["command"] for start in run.starts if isinstance(start.get("command"), str)))
    return {**facts, **({"Commands": [f"`{command}`" for command in commands]} if commands else {})}


def _of_design(run: Run) -> dict[str, Any]:
    """Scores of a search's or a scaling's final topology."""
    record = run.result if run.kind == "search" and run.result else run.trace[-1]
    chosen = next(
        (one for one in record.get("candidates", []) if one.get("topology") == record.get("topology")), record
    )
    scores = {name: chosen[name] for name in ("length_distortion", "ntk_condition") if name in chosen}
    if not scores:
        return {}
    text = [f"{name.replace('_', ' ')} {as_float(value):.4g}" for name, value in scores.items()]
    return {f"Scores without training ({run.config.get('convention', 'paper')} convention)": text}


def _of_training(run: Run) -> dict[str, Any]:
    """Schedule, length and accuracy of a training."""
    config, best = run.config, best_row(run.trace)
    saving = f"{100 * as_float(config['saving']):.0f} % of the multiply-adds saved"
    facts = {
        "Schedule": f"{config['schedule']} (epochs : times fewer tokens per side), {saving}",
        "Training": f"{len(run.trace)} of {config['epochs']} epochs, {config['train_images']:,} images an epoch, "
        f"{config['images_per_update']} an update",
    }
    return facts if best is None else {**facts, "Top-1": f"{accuracy(best):.2f} %, on the validation images"}
