"""A network as a graph of torch's own operations: ONNX files, and programs of torch.export that load without us."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table

from . import models  # noqa: F401  whose ops have decompositions from then on
from .errors import InputError, first_line
from .modes import evaluation_mode

TOLERANCE = 1e-5  # of the largest output, between what was exported and the network
METADATA = "asvit_fast.json"  # beside the program, inside its file


def require(packages: Sequence[str], purpose: str) -> None:
    """Raise InputError unless all are installed, before any work."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"{purpose} needs {', '.join(missing)}: pip install 'asvit-fast[onnx]'")


def to_program(model: nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The network in evaluation mode as a program of torch's own operations, images [B, *shape] of any B -> outputs.

    Raises:
        InputError: a network that torch.export cannot follow.
    """
    images = torch.zeros(2, *shape)  # [2, C, H, W]
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), evaluation_mode(model):
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
        ours = {op: function for op, function in decomposition_table.items() if str(op).startswith("asvit_fast")}
        program = program.run_decompositions(ours)
    except Exception as error:  # of torch's tracer: of many kinds and many lines
        raise InputError(f"torch.export cannot follow {type(model).__name__}: {first_line(error)}") from error
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    foreign = {str(target) for target in targets if getattr(target, "namespace", "aten") not in ("aten", "prims")}
    if foreign:  # they would have to be imported before the program is loaded
        raise InputError(f"the network has operations that torch has not: {', '.join(sorted(foreign))}")
    return program


def save_program(model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """``to_program`` as a .pt2 file, checked by loading it; ``torch.export.load(path).module()`` is the network.

    ``metadata`` needs "input_size"; all of it is inside as ``asvit_fast.json``, one of torch's ``extra_files``.
    """
    program = to_program(model, metadata["input_size"])
    torch.export.save(program, path, extra_files={METADATA: json.dumps(dict(metadata))})
    loaded = torch.export.load(path).module()
    _check(model, loaded, metadata["input_size"], "the exported program")


def save_onnx(model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """The network as an ONNX file, images [batch, C, H, W] -> logits, checked in ONNX Runtime where it is installed.

    ``metadata`` needs "input_size"; each entry is inside as JSON, among the file's metadata.

    Raises:
        InputError: packages that are missing, operations that ONNX has not, other numbers than torch's.
    """
    require(("onnx", "onnxscript"), "ONNX")
    program = to_program(model, metadata["input_size"])
    try:
        with torch.no_grad():  # with gradients torch decomposes its attention into views of strides that are not there
            onnx: Any = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},), verbose=False
            )
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be written as ONNX: {first_line(error)}") from error
    onnx.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(path)
    if runtime_installed():
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        _check(
            model,
            lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
            metadata["input_size"],
            "ONNX Runtime",
        )


def runtime_installed() -> bool:
    """Whether ONNX files are checked by running them."""
    return importlib.util.find_spec("onnxruntime") is not None


def _check(model: nn.Module, exported: Callable[[Tensor], Tensor], shape: tuple[int, int, int], name: str) -> None:
    """Raise InputError when it computes something else."""
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        images = torch.randn(batch, *shape, generator=generator)  # [B, C, H, W]
        with torch.no_grad(), evaluation_mode(model):
            expected = model(images)  # [B, classes]
            found = exported(images)  # [B, classes]
        error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        if not error <= TOLERANCE:
            raise InputError(f"{name} computes something else: outputs differ by {error:.1e} of the largest")
