"""Settings of scores, searches, scalings, benchmarks, tuning: each choice once, with its default and its meaning.

The command line makes its options of the fields, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .topology import DEFAULT_WIDTH

if TYPE_CHECKING:
    import torch

ImageSize = int | tuple[int, int]  # pixels: a side, or (height, width)

MIN_IMG_SIZE = 32  # pixels per side that our networks take
LARGEST_SEED = 2**63 - 1
POS_EMBEDS = ("absolute", "none")
CONVENTIONS = ("paper", "reference")
SCALE_RULES = ("scores", "random", "swin", "vit", "resnet", "uniform")  # what chooses the next step of a growth
SEARCH_RULES = ("reinforce", "random", "evolution")  # what draws the next topology of a search
METRICS = ("length_distortion", "curvature", "gauss_length", "ntk_condition")
EXPORT_FORMATS = {  # and their files, the first of which makes a folder an export
    "timm": ("config.json", "model.safetensors"),
    "onnx": ("model.onnx",),
    "exported": ("model.pt2",),
}
BACKENDS = ("reference", "triton", "cuda", "cpu", "sdpa")  # that an op may run on
DETECTORS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
TUNED_OPS = ("window_attention", "patch_embed", "patch_merge")
BENCH_MODES = ("inference", "train")
PEERS = ("source", "compiled", "sdpa", "sdpa-compiled", "onnxruntime", "openvino", "openvino-f32")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # short name -> torch's


def image_sides(img_size: Any, minimum: int = 1) -> tuple[int, int]:
    """(height, width) of an image size. Raises InputError for a side below ``minimum`` pixels, or no size at all."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < minimum for side in sides):
        raise InputError(f"img_size must be {minimum} pixels or more, one integer or (height, width), got {img_size!r}")
    return sides


def check_kind(name: str, value: Any, kind: Any, expected: str) -> None:
    """Raise InputError unless it is an instance of a class (or union of classes); ``expected`` says so in words."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {expected}, got {type(value).__name__}")


def check_rate(name: str, value: Any) -> None:
    """Raise InputError unless it is a probability below 1."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(f"{name} must be a number from 0 on and below 1, got {value!r}")


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise InputError unless it is an integer in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{name} must be an integer of {minimum} or more, got {value!r}")
    if maximum is not None and value > maximum:
        raise InputError(f"{name} must be an integer of at most {maximum}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InputError unless it is one of the choices."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_seed(seed: Any) -> None:
    """Raise InputError for what some generator of random numbers does not take."""
    check_integer("seed", seed, 0, LARGEST_SEED)


def _setting(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and its limits: ``minimum`` (included), ``above``, ``below``, ``choices``."""
    return field(default=default, metadata={"help": help, **limits})


class Settings:
    """Checks integers and choices against the limits of their fields. Raises InputError for a value out of them."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            self._check(one, getattr(self, one.name))

    def changed(self, *names: str) -> list[str]:
        """Those of the names whose values are not the defaults."""
        defaults = {one.name: one.default for one in fields(self)}  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) != defaults[name]]

    @staticmethod
    def _check(one: Field[Any], value: Any) -> None:
        if value is None and "None" in str(one.type):
            return
        if "minimum" in one.metadata:
            for number in value if isinstance(value, tuple) else (value,):
                check_integer(one.name, number, one.metadata["minimum"])
        elif "choices" in one.metadata and str(one.type).startswith("str"):
            check_choice(one.name, value, one.metadata["choices"])
        elif "choices" in one.metadata:
            unknown = [str(name) for name in value if name not in one.metadata["choices"]]
            if unknown or not value:
                expected = ", ".join(one.metadata["choices"])
                raise InputError(f"{one.name} must be some of {expected}, got {', '.join(unknown) or 'none'}")
        elif one.name == "img_size":
            image_sides(value)


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """Choices of a score.

    ``norms``: "auto" takes the norms out of our networks for the curve (as the authors do) and keeps those of any
    other; "identity" and "keep" do so for every network. Raises InputError for a value that cannot be used.
    """

    metrics: tuple[str, ...] = _setting(
        ("length_distortion", "curvature", "ntk_condition"), "scores to compute, separated by commas", choices=METRICS
    )
    img_size: int | tuple[int, int] = _setting(224, "image size in pixels: a side, or HEIGHTxWIDTH")
    thetas: int = _setting(10, "number of points on the circle of the curve measures", minimum=1)
    repeats: int = _setting(5, "number of freshly initialised networks to average over", minimum=1)
    batch: int = _setting(16, "number of images in the NTK's Gram matrix", minimum=1)
    convention: str = _setting("paper", "formulas: of the paper, or of the authors' code", choices=CONVENTIONS)
    norms: str = _setting(
        "auto",
        "norms on the curve: auto drops those of As-ViTs, keeps those of other models; identity | keep force one",
        choices=("auto", "identity", "keep"),
    )
    device: str | torch.device | None = _setting(  # noqa: RUF009  (a field)
        None, "where to compute: cpu, cuda, cuda:1, ...; without it, cuda if there is one"
    )

    def __post_init__(self) -> None:
        names = self.metrics.split(",") if isinstance(self.metrics, str) else self.metrics
        object.__setattr__(self, "metrics", tuple(names))
        super().__post_init__()
        if "ntk_condition" in self.metrics and self.batch < 2:
            raise InputError(f"batch must be 2 or more for ntk_condition, which compares images, got {self.batch}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (3, *image_sides(self.img_size))


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Choices of a search and its policy. Raises InputError for a value that cannot be used."""

    steps: int = _setting(500, "number of topologies to sample; a run on record goes on with more", minimum=1)
    width: int = _setting(DEFAULT_WIDTH, "number of channels in the first stage of the scored networks", minimum=1)
    history: int = _setting(20, "number of steps in the range of the reference convention's reward", minimum=2)
    lr: float = _setting(0.08, "learning rate of the policy, a number above 0", above=0)
    momentum: float = _setting(
        0.9, "momentum of the moving average that rewards are compared with, a number below 1", below=1
    )
    rule: str = _setting(
        "reinforce",
        "what draws topologies: reinforce (the paper's policy gradient); for comparison random (uniformly), or "
        "evolution (50 random ones, then each changes one dimension of a good one among the last 50)",
        choices=SEARCH_RULES,
    )
    topk: int = _setting(10, "number of best sampled topologies that result.json and top.csv list", minimum=1)
    batch_size: int = _setting(1, "number of images in the forward pass that --latency-ms counts", minimum=1)


@dataclass(frozen=True)
class ScaleSettings(Settings):
    """Limits of a scaling. Raises InputError for a value that cannot be used."""

    max_params: float | tuple[float, float] = _setting(
        100_000_000,
        "largest number of parameters, also of a run on record; or 80M:110M = stop from the first number on, never "
        "exceed the second",
    )
    max_steps: int | None = _setting(None, "largest number of growth steps", minimum=1)
    shrink: int | None = _setting(
        None, "real width / scored width, a whole number; without it 1, or 4 in the reference convention", minimum=1
    )
    rule: str = _setting(
        "scores",
        "what chooses among the candidates of a step: scores (the paper's); for comparison, without scores: random; "
        "uniform (equal depths, width by 10 %); vit (equal depths, width by 20 %); swin (depths 1:1:3:1) and resnet "
        "(3:4:6:3), width by 5 %",
        choices=SCALE_RULES,
    )


@dataclass(frozen=True)
class StudySettings(Settings):
    """Choices of a study. Raises InputError for a value that cannot be used."""

    topologies: int = _setting(87, "number of topologies; a study on record goes on with more", minimum=1)
    sampling: str = _setting(
        "stratified",
        "uniform, or stratified: by turns from each eighth of the space by number of parameters",
        choices=("stratified", "uniform"),
    )
    width: int = _setting(DEFAULT_WIDTH, "number of channels in the first stage of the networks", minimum=1)
    repeats: int = _setting(3, "trainings of a topology that is trained with several seeds", minimum=1)
    repeat_every: int = _setting(
        8, "one topology in this number is trained with several seeds, which tells the noise of accuracies", minimum=1
    )
    score_repeats: int = _setting(5, "number of freshly initialised networks to average each measure over", minimum=1)


@dataclass(frozen=True)
class TuneSettings(Settings):
    """Choices of the tuning of Triton kernels. Raises InputError for a value that cannot be used."""

    ops: tuple[str, ...] = _setting(TUNED_OPS, f"ops whose kernels to tune: {', '.join(TUNED_OPS)}", choices=TUNED_OPS)
    topology: tuple[str, ...] = _setting(
        (),
        "tune for the shapes of this topology (may be repeated), not for the paper's networks and Swin",
        repeated=True,
    )
    shapes: tuple[str, ...] = _setting(
        (), "tune for these windows: ROWSxCOLUMNSxHEAD_DIM in tokens and channels, and a b if there is a bias"
    )
    dtypes: tuple[str, ...] = _setting(tuple(DTYPES), f"of the activations: {', '.join(DTYPES)}", choices=tuple(DTYPES))
    batch: int = _setting(32, "number of images in each timed call", minimum=1)


@dataclass(frozen=True)
class BenchSettings(Settings):
    """Choices of a benchmark of networks. Raises InputError for a value that cannot be used."""

    batch_sizes: tuple[int, ...] = _setting(
        (1, 8),
        "numbers of images in a batch; sweep = 1,2,4,... The sizes of a provider end where its memory does",
        minimum=1,
    )
    modes: tuple[str, ...] = _setting(
        BENCH_MODES, "inference, train (a step's forward and backward pass), or both", choices=BENCH_MODES
    )
    against: tuple[str, ...] = _setting(
        ("source", "compiled"),
        "peers: source (as its library makes it), compiled (torch.compile of it), sdpa (the library's switch for "
        "torch's fused attention), sdpa-compiled; on a CPU onnxruntime, openvino (as installed), openvino-f32",
        choices=PEERS,
    )
    dtype: str = _setting("fp32", f"of weights and images: {', '.join(DTYPES)}", choices=tuple(DTYPES))
    amp: str | None = _setting(None, "mixed precision (torch.autocast) in bf16 or fp16", choices=("bf16", "fp16"))
    compile: bool = _setting(False, "run ours through torch.compile as well, as ours-compiled")
    channels_last: bool = _setting(False, "weights and images in the memory format channels_last")
    img_size: int | tuple[int, int] | None = _setting(
        None, "image size in pixels: a side, or HEIGHTxWIDTH; without it the network's"
    )
    rounds: int = _setting(10, "number of turns of each provider; medians and quartiles are of these", minimum=2)
    seed: int = _setting(0, "seed (a whole number) of weights and images that are drawn")
    device: str | torch.device | None = _setting(  # noqa: RUF009  (a field)
        None, "where to compute: cpu, cuda, cuda:1, ...; without it, cuda if there is one"
    )

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "modes", "against"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        super().__post_init__()
        check_seed(self.seed)
        if not self.batch_sizes:
            raise InputError("batch_sizes must be one or more numbers of images, got none")
        if self.amp is not None and self.dtype != "fp32":
            raise InputError(f"amp {self.amp} keeps the weights in fp32, got dtype {self.dtype}; leave one of them out")

    @property
    def precision(self) -> str:
        """Of weights and images, or of mixed precision."""
        return self.dtype if self.amp is None else f"amp {self.amp}"
