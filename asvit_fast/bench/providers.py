"""Who runs a network: its library as it is, with torch.compile or fused attention, ours, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, graph
from ..acceleration import accelerate
from ..acceleration.verify import named_tensors
from ..errors import InputError, one_line
from ..models import AsViT
from ..settings import BenchSettings
from .sources import Sample, Source
from .workloads import DTYPES

Run = Callable[[], list[Tensor]]  # outputs, or gradients of all parameters

OURS = ("ours", "ours-compiled")


@dataclass(frozen=True)
class Provider:
    """One way to run a network.

    Attributes:
        name: as ``against`` takes it, or "ours".
        backend: what runs it, in words.
        precision: of its products.
        dtype: of weights and images, in words.
        prepare: (mode, batch) -> a call that computes what the mode is about.
        modes: that it can run.
        seen: whether torch sees the memory that it takes.
    """

    name: str
    backend: str
    precision: torch.dtype
    dtype: str
    prepare: Callable[[str, Sample], Run]
    modes: tuple[str, ...] = ("inference", "train")
    seen: bool = True


class Impossible(Exception):
    """Why a provider does not run this network here."""


@dataclass(frozen=True)
class Place:
    """Where and in what precision networks of torch run."""

    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None
    channels_last: bool

    @classmethod
    def of(cls, settings: BenchSettings) -> Place:
        """As the settings say. Raises InputError for a device that is not there."""
        amp = None if settings.amp is None else DTYPES[settings.amp]
        device = backends.computing_device(settings.device)
        return cls(device, DTYPES[settings.dtype], amp, settings.channels_last)

    @property
    def precision(self) -> torch.dtype:
        """Of products."""
        return self.amp or self.dtype

    def __str__(self) -> str:
        return _short(self.dtype) if self.amp is None else f"autocast {_short(self.amp)}"

    def model(self, source: nn.Module) -> nn.Module:
        """The network there."""
        model = source.to(self.device, self.dtype)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def tensor(self, x: Tensor) -> Tensor:
        """An input there."""
        x = x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision, or nothing."""
        return contextlib.nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)


# --------------------------------------------------------------------------- what is computed


def inference(model: nn.Module, sample: Sample, place: Place) -> Run:
    """Outputs."""

    def run() -> list[Tensor]:
        with torch.inference_mode(), place.autocast():
            return [x for _, x in named_tensors("output", sample.call(model)) if x.is_floating_point()]

    return run


def training_step(model: nn.Module, sample: Sample, place: Place) -> Run:
    """Gradients of all parameters: forward and backward of a step, without an optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> list[Tensor]:
        with place.autocast():
            output = sample.call(model)
        gradients = torch.autograd.grad(_loss(output), parameters, allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]

    return run


def _loss(output: Any) -> Tensor:
    """The cross entropy of one tensor of logits [B, classes], the sum of mean squares of anything else."""
    tensors = [x for _, x in named_tensors("output", output) if x.requires_grad]
    wide = [x if x.dtype == torch.float64 else x.float() for x in tensors]
    if len(wide) == 1 and wide[0].ndim == 2:
        return F.cross_entropy(wide[0], torch.zeros(len(wide[0]), dtype=torch.long, device=wide[0].device))
    if not wide:
        raise InputError(
            "there is nothing to differentiate: the network's output holds no tensor in a list, tuple or dict, or "
            "depends on no parameter that requires a gradient; give modes inference"
        )
    return torch.stack([x.square().mean() for x in wide]).sum()


def run_torch(model: nn.Module, place: Place, own: bool, mode: str, sample: Sample) -> Run:
    """A mode of a network of torch. ``own``: our own network on torch's operations instead of our ops, as a source."""
    model.train(mode == "train")
    run = (training_step if mode == "train" else inference)(model, sample, place)
    if not own:
        return run

    def reference() -> list[Tensor]:
        with backends.use_backend("reference"):
            return run()

    return reference


def exact(source: Source, mode: str, images: int, device: torch.device) -> list[Tensor]:
    """What the source computes of its first images in float64."""
    place = Place(device, torch.float64, None, False)
    model = place.model(copy.deepcopy(source.model))
    sample = source.sample.batch(images, images, place.tensor)
    return run_torch(model, place, isinstance(model, AsViT), mode, sample)()


def relative_distance(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Error of all tensors together: a bias before a batch norm has a gradient of zero, and errors relative to that.
    Infinities that are the same are right, as those of masked logits are; zeros, too.

    Raises:
        InputError: there is no tensor of numbers to compare.
    """
    if not exact:
        raise InputError("the network's output holds no tensor of floating-point numbers in a list, tuple or dict")
    apart = total = 0.0
    for a, b in zip(got, exact, strict=True):
        wide = a.double()
        same = (wide == b) & wide.isinf()
        apart += (wide - b).masked_fill(same, 0.0).square().sum().item()
        total += b.masked_fill(same, 0.0).square().sum().item()
    return math.sqrt(apart / total) if total else math.sqrt(apart)


def tolerance(precision: torch.dtype, device: torch.device) -> float:
    """The largest relative distance from float64 that is still rounding."""
    if precision == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return 1e-2  # convolutions are in TF32
    return {torch.float32: 1e-3, torch.bfloat16: 2e-1, torch.float16: 5e-2}[precision]


# --------------------------------------------------------------------------- the providers


def providers(source: Source, settings: BenchSettings, place: Place) -> tuple[list[Provider], dict[str, str]]:
    """Those of the settings that can run the network here, and why the others cannot. Weights are shared, and moved to
    the place."""
    place.model(source.model)
    found, reasons = [], {}
    names = [*settings.against, *OURS[: 1 + settings.compile]]
    for name in dict.fromkeys(names):
        try:
            found.append(_MAKERS[name](name, source, place))
        except Impossible as error:
            reasons[name] = str(error)
    return found, reasons


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, so that many providers take no more memory than one."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _of_torch(name: str, source: Source, place: Place) -> Provider:
    model = place.model(_sharing(source.model))
    own = isinstance(model, AsViT) and name not in OURS
    words = [f"torch {torch.__version__}"]
    if own:
        words.append("our network on torch's operations, of which a compiler sees each op alone")
    if name.startswith("sdpa"):
        words.append(_switch_attention(model))
    if name in OURS:
        words.append(f"accelerate: {len(accelerate(model).swapped)} modules swapped")
        if isinstance(model, AsViT):
            words.append("our network on our ops")
    words.append("compiled" if name.endswith("compiled") else "eager")

    def prepare(mode: str, sample: Sample) -> Run:
        network: Any = torch.compile(model, dynamic=False) if name.endswith("compiled") else model
        return run_torch(network, place, own, mode, sample)

    return Provider(name, ", ".join(words), place.precision, str(place), prepare)


def _switch_attention(model: nn.Module) -> str:
    """Turn the library's switch for torch's fused attention on, in place; the words for it."""
    own = [module for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]
    if own:  # timm's, which TIMM_FUSED_ATTN=2 turns on everywhere
        if all(module.fused_attn for module in own):
            raise Impossible("timm has its fused attention on in the source already")
        for module in own:
            module.fused_attn = True  # type: ignore[assignment]
        return "fused_attn on"
    config = getattr(model, "config", None)
    if hasattr(config, "_attn_implementation") and hasattr(model, "set_attn_implementation"):
        if config._attn_implementation == "sdpa":  # type: ignore[union-attr]
            raise Impossible("transformers runs the source with attn_implementation='sdpa' already")
        try:
            model.set_attn_implementation("sdpa")  # type: ignore[operator]
        except (ValueError, ImportError) as error:
            raise Impossible(f"transformers has no sdpa for it: {one_line(error)}") from None
        return "attn_implementation='sdpa'"
    raise Impossible("the network has no switch for it (fused_attn of timm, attn_implementation of transformers)")


def _check_graph(package: str, source: Source, place: Place) -> None:
    """Whether a runtime for graphs can take part."""
    if place.device.type != "cpu":
        raise Impossible(f"it is a peer on CPUs, and this runs on {place.device}")
    if importlib.util.find_spec(package) is None:
        raise Impossible(f"{package} is not installed: pip install 'asvit-fast[bench]'")
    if not isinstance(source.sample.value, Tensor):
        raise Impossible("it gets networks of one input")


class _Tensors(nn.Module):
    """A network whose output is its tensor, or a tuple of its tensors: graphs hold no containers of other packages."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = tuple(x for _, x in named_tensors("output", self.network(images)) if x.is_floating_point())
        return found[0] if len(found) == 1 else found


def _plain(model: nn.Module) -> nn.Module:
    """A copy for inference, float32, on the CPU."""
    return _Tensors(copy.deepcopy(model).cpu().float()).eval()


def _exporter(source: Source) -> Callable[[], bytes]:
    """The network as an ONNX file for any batch, of standard operators only; made when it is first asked for."""

    @functools.cache
    def exported() -> bytes:
        shape = tuple(source.sample.value.shape[1:])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            graph.save_onnx(_plain(source.model), path, {"input_size": shape})
            return path.read_bytes()

    return exported


def _onnxruntime(name: str, source: Source, place: Place) -> Provider:
    _check_graph("onnxruntime", source, place)
    import onnxruntime

    exported = _exporter(source)

    def prepare(mode: str, sample: Sample) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_free_dimension_override_by_name("batch", sample.images)
        session = onnxruntime.InferenceSession(exported(), options, providers=["CPUExecutionProvider"])
        images = {session.get_inputs()[0].name: sample.value.float().contiguous().numpy()}
        return lambda: [torch.from_numpy(output) for output in session.run(None, images)]

    backend = f"ONNX Runtime {onnxruntime.__version__}, CPUExecutionProvider"
    return Provider(name, backend, torch.float32, "float32", prepare, ("inference",), seen=False)


def _openvino(name: str, source: Source, place: Place) -> Provider:
    _check_graph("openvino", source, place)
    import openvino

    exported = _exporter(source)
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if name == "openvino-f32":
        options["INFERENCE_PRECISION_HINT"] = "f32"

    def prepare(mode: str, sample: Sample) -> Run:
        images = sample.value.float().contiguous()
        core = openvino.Core()
        model = core.read_model(io.BytesIO(exported()))
        model.reshape(list(images.shape))
        compiled = core.compile_model(model, "CPU", options)
        return lambda: [torch.from_numpy(output) for output in compiled(images.numpy()).values()]

    hint = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")  # as installed
    words = "f32" if name == "openvino-f32" else hint.get_type_name()
    precision = {"bf16": torch.bfloat16, "f16": torch.float16}.get(words, torch.float32)
    backend = f"OpenVINO {openvino.__version__.partition('-')[0]}, runs in {words}"
    return Provider(name, backend, precision, _short(precision), prepare, ("inference",), seen=False)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_MAKERS: dict[str, Callable[[str, Source, Place], Provider]] = {
    **dict.fromkeys(("source", "compiled", "sdpa", "sdpa-compiled", *OURS), _of_torch),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-f32": _openvino,
}
