"""Swap slow modules of other packages' vision transformers for fused ones, in place and reversibly.

An instance changes its class and nothing else: state_dict, parameters, hooks, training mode, deepcopy and pickle stay
as they were, and ``restore`` gives the class back. ``FAMILIES`` lists what is known, with what runs instead, or why it
is left alone.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .errors import InputError
from .nn.replacement import Replacement, bound, has_hooks, overridden


@dataclass(frozen=True)
class Family:
    """A class of another package: what it becomes and what that brings, or why it is left alone."""

    source: str  # package.module.Class, or the end of it for code that is not a package
    replacement: str | None  # module.Class below asvit_fast.nn, or None
    notes: str
    measured: str = ""  # how much faster, see families_table
    optional: bool = False  # not worth a line in the report where it stays as it is

    def table_row(self) -> str:
        """A row of the Markdown table that ``families_table`` makes."""
        becomes = "left alone" if self.replacement is None else f"`{self.replacement.rpartition('.')[2]}`"
        return f"| `{self.source}` | {becomes} | {self.notes} | {self.measured} |"


def _timm(module: str, *rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"timm.models.{module}.{row[0]}", *row[1:]) for row in rows)


def _torchvision(*rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"torchvision.{row[0]}", *row[1:]) for row in rows)


ATTENTION = "window attention without copies of windows"
INSIDE = "with its block"
PARTS = "inference on a CPU: tokens in parts that stay in the cache"
MERGE = "neighbourhoods normalised and projected in one op"
PRODUCT = "float32 on a CPU: products by oneDNN"
EMBED = "convolution and LayerNorm in one op"
POST_NORM = "it normalises after the projection: nothing to fuse"
FAMILIES: tuple[Family, ...] = (
    *_timm(
        "swin_transformer",
        ("SwinTransformerBlock", "swin.FastSwinTransformerBlock", ATTENTION, "Swin-T 2.2x, 1.6x; Swin-S3-T 2.1x, 1.6x"),
        ("WindowAttention", "swin.FastWindowAttention", INSIDE),
        ("PatchMerging", "merging.FastPatchMerging", MERGE, "the module 6x, 1.4x"),
    ),
    *_timm(
        "swin_transformer_v2",
        ("SwinTransformerV2Block", "swin_v2.FastSwinTransformerV2Block", ATTENTION, "Swin-V2-T 1.9x, 1.6x"),
        ("WindowAttention", "swin_v2.FastWindowAttentionV2", INSIDE),
        ("PatchMerging", None, POST_NORM),
    ),
    *_timm(
        "swin_transformer_v2_cr",
        ("SwinTransformerV2CrBlock", "swin_v2.FastSwinTransformerV2CrBlock", ATTENTION, "Swin-V2-CR-T 1.7x, 1.5x"),
        ("WindowMultiHeadAttention", "swin_v2.FastWindowMultiHeadAttention", INSIDE),
    ),
    *_timm(
        "maxxvit",
        ("PartitionAttentionCl", "maxvit.FastPartitionAttentionCl", ATTENTION, "MaxViT-T 1.3x, 1.2x"),
        ("ParallelPartitionAttention", "maxvit.FastParallelPartitionAttention", ATTENTION),
        ("AttentionCl", "maxvit.FastAttentionCl", INSIDE),
        ("Attention2d", None, "channels first: layout copies would cost what the kernel gains"),
    ),
    *_timm(
        "tiny_vit",
        ("TinyVitBlock", "tiny_vit.FastTinyVitBlock", ATTENTION, "TinyViT-5M 1.4x, 1.2x"),
        ("Attention", "tiny_vit.FastTinyVitAttention", INSIDE),
        ("NormMlp", "mlp.FastNormMlp", PARTS),
    ),
    *_timm(
        "davit",
        ("SpatialBlock", "davit.FastSpatialBlock", ATTENTION, "DaViT-T 1.6x, 1.4x"),
        ("WindowAttention", "davit.FastDavitWindowAttention", INSIDE),
        ("Stem", None, "below 1 percent of the network's time"),
    ),
    *_timm(
        "twins", ("LocallyGroupedAttn", "local_attention.FastLocallyGroupedAttn", ATTENTION, "Twins-SVT-S 1.8x, 1.3x")
    ),
    *_timm("nest", ("Attention", "local_attention.FastNestAttention", ATTENTION, "NesT-T 1.9x, 1.7x")),
    *_timm("pvt_v2", ("OverlapPatchEmbed", "embedding.FastOverlapPatchEmbed", EMBED, "PVT-V2-B1 1.3x, 1.1x")),
    *_timm("convnext", ("ConvNeXt", None, "its stem: below 1 percent of the network's time")),
    Family("timm.layers.patch_embed.PatchEmbed", "embedding.FastPatchEmbed", EMBED, "the module 2x, 1x"),
    Family("timm.layers.mlp.Mlp", "mlp.FastMlp", PARTS, "25,088 tokens of 96 channels 2.5x, -"),
    Family("torch.nn.modules.linear.Linear", "fast_linear.FastLinear", PRODUCT, "ConvNeXt-T 1.7x, 1.5x", optional=True),
    *_torchvision(
        (
            "models.swin_transformer.ShiftedWindowAttention",
            "torchvision_swin.FastShiftedWindowAttention",
            ATTENTION,
            "Swin-T 1.9x, 1.6x",
        ),
        (
            "models.swin_transformer.ShiftedWindowAttentionV2",
            "torchvision_swin.FastShiftedWindowAttentionV2",
            ATTENTION,
            "Swin-V2-T 1.7x, 1.5x",
        ),
        ("models.swin_transformer.PatchMerging", "merging.FastTorchvisionPatchMerging", MERGE),
        ("models.swin_transformer.PatchMergingV2", None, POST_NORM),
        ("ops.misc.MLP", "mlp.FastTorchvisionMLP", PARTS),
    ),
    Family(
        "cell_operations.TransformerBlock",
        "authors.FastAuthorsTransformerBlock",
        ATTENTION,
        "a network of 10 blocks 5.3x, 3.1x",
    ),
    Family("cell_operations.WindowAttention", "authors.FastAuthorsWindowAttention", INSIDE),
    Family("cell_operations.PatchMerging", "authors.FastAuthorsPatchMerging", MERGE),
    Family("cell_operations.Mlp", "authors.FastAuthorsMlp", PARTS),
    Family("cell_infers.transformer.PatchEmbed", "authors.FastAuthorsPatchEmbed", EMBED),
)


def families_table() -> str:
    """``FAMILIES`` as a Markdown table.

    Its last column has the speed in inference and in a training step of a whole network after ``accelerate`` against
    the same network before: an AMD EPYC, float32, interleaved rounds of 1 to 8 images of 224 x 224 pixels (V2 256 x
    256); two cores for networks in benchmarks/results/models.csv, one for the others.
    """
    head = ["| module | becomes | what it brings | faster: inference, training |", "|---|---|---|---|"]
    return "\n".join([*head, *(family.table_row() for family in FAMILIES)])


# --------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Decision:
    """What happens to one module."""

    name: str  # in the model
    source: str  # its class
    replacement: str | None  # the class that it has now, None if it was left
    reason: str | None  # why it was left
    gainless: bool = False  # left because nothing would be gained
    optional: bool = False  # summed up when the report is printed


@dataclass(frozen=True)
class Report:
    """Every module that ``accelerate`` considered; ``print`` it for a table."""

    decisions: tuple[Decision, ...]

    @property
    def swapped(self) -> list[Decision]:
        """The modules that have a fused class now."""
        return [decision for decision in self.decisions if decision.replacement is not None]

    @property
    def left(self) -> list[Decision]:
        """The modules of known classes that stayed as they are, each with its reason."""
        return [decision for decision in self.decisions if decision.replacement is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"swapped": len(self.swapped), "modules": [asdict(decision) for decision in self.decisions]}

    def __str__(self) -> str:
        rows = [
            (decision.name or "(the model)", decision.source, decision.replacement or f"left: {decision.reason}")
            for decision in self.decisions
            if not decision.optional
        ]
        others = Counter((d.source, d.replacement or "left") for d in self.decisions if d.optional)
        rows += [(f"{count} more", source, becomes) for (source, becomes), count in others.items()]
        summary = f"{len(self.swapped)} modules accelerated, {len(self.left)} of known classes left"
        if not rows:
            return f"{summary}: no module of a known class (asvit_fast.accelerate lists them in FAMILIES)"
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join([*(f"{n:<{widths[0]}}  {s:<{widths[1]}}  {what}" for n, s, what in rows), summary])


# --------------------------------------------------------------------------- which class becomes which


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _family_of(module: nn.Module) -> tuple[Family, type[nn.Module]] | None:
    """The family of the class of a module or of the nearest known base, and that class."""
    for kind in type(module).__mro__:
        name = _qualified_name(kind)
        for family in FAMILIES:
            if name == family.source or name.endswith(f".{family.source}"):
                return family, kind
    return None


def _replacement_of(module: nn.Module) -> type[Replacement] | None:
    """The class that a module of a known class, or of one derived from it, may become."""
    found = _family_of(module)
    if found is None or found[0].replacement is None:
        return None
    file, _, name = found[0].replacement.rpartition(".")
    return bound(getattr(importlib.import_module(f"asvit_fast.nn.{file}"), name), found[1])


def _inner(module: nn.Module, replacement: type[Replacement]) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(attribute, child, why not) of the children that are replaced with a module."""
    for name, expected in replacement.inner:
        child = getattr(module, name)
        kind = _replacement_of(child)
        if kind is None or not issubclass(kind, expected):
            yield name, child, f"it is a {_qualified_name(type(child))}"
        elif has_hooks(child):
            yield name, child, "it has hooks, which would see whole maps in place of windows"
        else:
            yield name, child, _why_left(child, kind)


def _why_left(module: nn.Module, replacement: type[Replacement]) -> str | None:
    """Why an instance keeps its class; None if it can be swapped."""
    source = replacement.source
    if type(module) is not source:
        return f"its class {_qualified_name(type(module))} is not exactly {_qualified_name(source)}"
    for method in overridden(replacement):
        if method in vars(module):
            return f"its {method} was replaced on the instance"
        owner = next(kind for kind in source.__mro__ if method in vars(kind))
        defined = getattr(vars(owner)[method], "__module__", owner.__module__)
        if defined != owner.__module__:
            return f"{owner.__name__}.{method} was replaced by {defined}"
    for name, _, why in _inner(module, replacement):
        if why is not None:
            return f"its {name}: {why}"
    return replacement.obstacle(module)


# --------------------------------------------------------------------------- swapping

Plan = tuple[nn.Module, type[Replacement] | None, Decision]


def _considered(model: nn.Module) -> Iterator[Plan]:
    """Every module of a known class, with the class that it gets."""
    parents: dict[nn.Module, str | None] = {}  # of children that are decided with their parent: why that is left
    for name, module in model.named_modules():
        kind = type(module)
        found = _family_of(module)
        if found is None:
            continue
        family, source = found
        title = _qualified_name(source if issubclass(kind, Replacement) else kind)
        why: str | None = None
        try:
            replacement = _replacement_of(module)
        except (ImportError, AttributeError) as error:
            yield module, None, Decision(name, title, None, f"this version of its package is not known: {error}")
            continue
        gainless = family.notes if replacement is None else replacement.gainless(module)
        if issubclass(kind, Replacement):
            yield module, None, Decision(name, title, kind.__name__, None, optional=family.optional)
            continue
        if replacement is None or gainless is not None:
            if not family.optional:
                yield module, None, Decision(name, title, None, gainless, gainless=True)
            continue
        if replacement.only_inside and module not in parents:
            why = f"only taken inside of a {replacement.only_inside}"
        else:
            why = parents.get(module) or _why_left(module, replacement)
        for _, child, _ in _inner(module, replacement):
            parents[child] = why and f"left with its {replacement.source.__name__}: {why}"
        if why is None:
            yield module, replacement, Decision(name, title, replacement.__name__, None, optional=family.optional)
        elif not family.optional:
            yield module, None, Decision(name, title, None, why)


def accelerate(model: nn.Module, strict: bool = False) -> Report:
    """Give the modules of known classes (``FAMILIES``) in a model a class that runs fused ops, in place.

    Same parameters, state_dict, hooks and results up to rounding (``verify`` compares on your data); nothing but the
    class of single instances changes, so deepcopy, pickle, optimizers, EMA, torch.compile and sharding work as before.
    Shard (``fully_shard``) and compile after this call; tools that look for exact types, such as torch.ao's
    ``quantize_dynamic``, come before it. torch.jit.script needs the restored model, and so does torch.fx where it does
    not take replacements as leaves, as timm's feature extraction does. torch.export keeps the fused ops;
    torch.onnx.export (``dynamo=True``) replaces them by standard operators. Calling it again changes nothing;
    ``restore`` undoes it.

    A module is left alone, with the reason in the report, when its class is a subclass of a known one or was patched,
    or when something that the fused op would bypass has hooks or another type than expected. What turns up later, such
    as a hook or attention dropout in training, is said once when it runs (``FallbackWarning``).

    Two things are not as before: attention modules inside accelerated blocks are called with whole maps [B, H, W, C]
    in place of windows, which hooks added later see; and with dropout after a projection the mask is drawn in the order
    of the map instead of that of windows, so that single numbers differ from a run with the same seed.

    Args:
        model: any model of timm, torchvision or your own; its modules are searched.
        strict: raise if a module of a known class cannot be taken. Classes that are known and left because nothing
            would be gained do not count.

    Returns:
        What was done: print it, or use ``swapped``, ``left`` and ``to_dict()``.

    Raises:
        InputError: with ``strict``, the modules left and why; the model is as it was.
    """
    plans = list(_considered(model))
    refused = [decision for _, _, decision in plans if decision.replacement is None and not decision.gainless]
    if strict and refused:
        names = "; ".join(f"{decision.name or 'the model'}: {decision.reason}" for decision in refused)
        raise InputError(f"accelerate(strict=True) cannot take {len(refused)} modules of known classes: {names}")
    for module, replacement, _ in plans:
        if replacement is not None:
            module.__class__ = replacement  # type: ignore[assignment]
    return Report(tuple(decision for _, _, decision in plans))


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every module gets the class back that it had. Returns the model.

    Also on copies and after unpickling; harmless on a model that was never accelerated. A class made from a replacement
    since (by ``fully_shard`` or a parametrization) is made again from the original.
    """
    for module in model.modules():
        if isinstance(module, Replacement):
            module.__class__ = _original(type(module))
    return model


def _original(kind: type) -> type:
    """The class that a replacement, or a class derived from one at run time, stands for."""
    if "source" in vars(kind):
        return kind.source  # type: ignore[attr-defined]
    bases = tuple(_original(base) if issubclass(base, Replacement) else base for base in kind.__bases__)
    names = {base.__name__: original.__name__ for base, original in zip(kind.__bases__, bases, strict=True)}
    name = kind.__name__
    for replaced, original in names.items():
        name = name.replace(replaced, original)
    members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(name, bases, members)
