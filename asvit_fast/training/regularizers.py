"""Losses for diversity: tokens, heads and neurons should not say the same thing twice (Diverse-ViT, arXiv 2203.06345).

Each term is the one that the paper's published training of DeiT uses; the formulas are in the functions. The paper's
networks have one stage; of networks with several, a term is the mean over the stages.
"""

from __future__ import annotations

import functools
import math
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..errors import InputError
from ..nn.attention import WindowAttention
from .parallel import full_tensor

TERMS = ("patch", "contrast", "attention", "weight")
QUERIES = 16  # rows of a window's attention that the attention term looks at
ITERATIONS = 4  # of the power method


def parse_regularizers(text: str) -> dict[str, float]:
    """ "patch:0.1,attention:1e-4" -> the weight of each term; "" -> {}.

    Raises:
        InputError: no such term, one named twice, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition(":")
        if name not in TERMS or name in weights:
            problem = "names a term twice" if name in weights else f"has no term {name!r}"
            raise InputError(f"regularizers: {text!r} {problem}; give NAME:WEIGHT of {', '.join(TERMS)}")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise InputError(f"regularizers: the weight of {name} must be a positive number, got {number!r}")
    return weights


def similarity(vectors: Tensor) -> Tensor:
    """Mean cosine of all pairs i != j of [..., n, C] -> [...], in O(n C): sum_ij u_i.u_j = |sum_i u_i|^2."""
    count = vectors.shape[-2]
    units = F.normalize(vectors, dim=-1)  # [..., n, C]
    return (units.sum(-2).square().sum(-1) - count) / max(count * (count - 1), 1)  # 0 where there is no pair


def patch_similarity(tokens: Tensor) -> Tensor:
    """Within-layer cosine of the tokens [B, n, C] of a stage's last block: sum_{i != j} cos(t_i, t_j) / (n (n - 1)).

    Over-smoothing drives it to 1. Signed, as in the published code (VITA-Group/Diverse-ViT), it needs no n x n matrix.
    """
    return similarity(tokens).mean()


def cross_layer_contrast(first: Tensor, last: Tensor) -> Tensor:
    """Tokens [B, n, C] of a stage's last block stay recognisable as those of its first: the mean over tokens i of
    -log(e^(a_i.b_i) / (e^(a_i.b_i) + e^(mean_{j != i} a_i.b_j))), a and b the unit vectors of first and last."""
    a, b = F.normalize(first, dim=-1), F.normalize(last, dim=-1)  # [B, n, C]
    own = (a * b).sum(-1)  # [B, n]
    others = ((a * b.sum(1, keepdim=True)).sum(-1) - own) / max(a.shape[1] - 1, 1)  # [B, n]
    return F.softplus(others - own).mean()


def attention_similarity(maps: Tensor) -> Tensor:
    """Mean cosine between the attention maps [B, heads, queries, keys] of the heads of a stage's first block."""
    return similarity(maps.flatten(2)).mean()


def conditional_orthogonality(weight: Tensor) -> Tensor:
    """(largest - smallest eigenvalue of W W^T)^2, the mean over matrices W [matrices, out, in].

    It is 0 when all singular values are equal. The eigenvalues are Rayleigh quotients after a few steps of the power
    method from a fixed vector, as in the paper from a random one; gradients pass through the steps.
    """
    gram = weight @ weight.mT  # [matrices, out, out]
    largest = _dominant_eigenvalue(gram)  # [matrices]
    shift = largest[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return _dominant_eigenvalue(gram - shift).square().mean()  # the smallest minus the largest


def _dominant_eigenvalue(matrix: Tensor) -> Tensor:
    """Symmetric [matrices, n, n] -> [matrices]."""
    vector = _start(matrix.shape[-1], matrix.device, matrix.dtype).expand(matrix.shape[0], -1, 1)  # [matrices, n, 1]
    for _ in range(ITERATIONS):
        vector = F.normalize(matrix @ vector, dim=1)
    return (vector * (matrix @ vector)).sum((1, 2))


@functools.lru_cache
def _start(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The start of the power method: [size, 1]."""
    return torch.rand(size, 1, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def attention_maps(qkv: Tensor, attention: Any) -> Tensor:
    """Some rows of a layer's attention, from its projection: [B, heads, queries, keys of the window].

    Window attention keeps no maps, and all of them would be n x n numbers a head. So each image shows one window (the
    b-th image the b-th, modulo their number), and of it QUERIES queries evenly spaced; windows cut by the border are
    left out. ``qkv`` is [B, H, W, 3 C] of ``WindowAttention``, or [B, n, 3 C] of timm's attention.
    """
    window = _one_window(qkv, attention) if qkv.dim() == 4 else qkv  # [B, n, 3 C]
    batch, count, _ = window.shape
    q, k, _ = window.reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, n, d]
    queries = torch.linspace(0, count - 1, min(QUERIES, count), device=q.device).long()  # [queries]
    q = q[:, :, queries]
    if qkv.dim() == 3:
        q, k = attention.q_norm(q), attention.k_norm(k)
    maps = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1)  # [B, heads, queries, n]
    high_pass = getattr(attention, "attn_scale", None)  # [heads]
    if high_pass is not None:  # (1 + w) A - w / n, arXiv 2203.05962
        maps = maps + high_pass[:, None, None] * (maps - 1 / count)
    return maps


def _one_window(qkv: Tensor, attention: Any) -> Tensor:
    """[B, H, W, 3 C] -> a window of each image: [B, tokens of a window, 3 C]."""
    batch, height, width, channels = qkv.shape
    splits = attention.splits
    rows, columns = attention.window or (-(-height // splits), -(-width // splits))
    rows, columns = min(rows, height), min(columns, width)
    down, across = height // rows, width // columns  # whole windows
    whole = qkv[:, : down * rows, : across * columns].reshape(batch, down, rows, across, columns, channels)
    image = torch.arange(batch, device=qkv.device)  # [B]
    chosen = image % (down * across)  # [B]
    return whole[image, chosen // across, :, chosen % across].flatten(1, 2)


class Regularization:
    """The terms of a network, from what its blocks compute in a pass:

        with regularization:
            logits = model(images)
        loss = criterion(logits, targets) + regularization.loss()

    For our networks and timm's vision transformers. Make it before the network's first compiled pass. Its hooks only
    note tensors that the pass makes anyway (so that checkpointed activations are computed again to the same ones), and
    do nothing outside of ``with``; ``remove`` takes them away. Under automatic mixed precision terms are float32.

    Args:
        model: the network itself, also where DistributedDataParallel runs it.
        weights: of the terms, see ``parse_regularizers``. The paper's DeiT-S has patch and contrast 0.5, attention
            1e-4, weight 0.018 (5e-4 times a sum over 36 matrices, which is a mean here). Its fourth loss, which mixes
            the labels of patches, is not among them.

    Raises:
        InputError: a network whose blocks are not known, or without anything that a term could compare.
    """

    def __init__(self, model: nn.Module, weights: dict[str, float]) -> None:
        self.weights = weights
        self.prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)  # class tokens are not patches
        self.stages = _stages(model)
        self._active = False
        self._noted: dict[str, Tensor] = {}  # outputs by the names in _watched
        self._terms: dict[str, Tensor] = {}
        self._watched = self._what_to_watch()
        self._handles = [module.register_forward_hook(self._note(name)) for name, module in self._watched.items()]

    def __enter__(self) -> Regularization:
        self._noted.clear()
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active = False

    def loss(self) -> Tensor:
        """The weighted sum of the terms of the last pass: []."""
        missing = sorted(self._watched.keys() - self._noted.keys())
        if missing:
            raise InputError(
                f"regularizers: {missing[0]} was not seen; run the network inside of `with regularization`, which must "
                "be made before the first compiled pass"
            )
        functions = {"patch": self._patch, "contrast": self._contrast, "attention": self._attention}
        total, self._terms = torch.zeros((), device=self._device), {}
        with torch.autocast(self._device.type, enabled=False):
            for name, weight in self.weights.items():
                term = functions.get(name, self._weight)()
                total = total + weight * term
                self._terms[name] = term.detach()
        self._noted.clear()  # what the graph needs it keeps itself
        return total

    @property
    def terms(self) -> dict[str, float]:
        """The terms of the last ``loss``, not weighted; reading them waits for the device."""
        return {name: term.item() for name, term in self._terms.items()}

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    # ------------------------------------------------------------------ watching

    def _what_to_watch(self) -> dict[str, nn.Module]:
        watched: dict[str, nn.Module] = {}
        if "patch" in self.weights or "contrast" in self.weights:
            watched |= {f"the last block of stage {index}": stage[-1] for index, stage in enumerate(self.stages)}
        if "contrast" in self.weights:
            self._deep = [index for index, stage in enumerate(self.stages) if len(stage) > 1]
            if not self._deep:
                raise InputError("regularizers: contrast needs two blocks in a stage; leave it out")
            watched |= {f"the first block of stage {index}": self.stages[index][0] for index in self._deep}
        if "attention" in self.weights:
            self._heads = [index for index, stage in enumerate(self.stages) if stage[0].attn.num_heads > 1]
            if not self._heads:
                raise InputError("regularizers: attention needs two heads in a stage; leave it out")
            watched |= {f"the projection of stage {index}": self.stages[index][0].attn.qkv for index in self._heads}
        return watched

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if self._active:
                self._noted[name] = output

        return hook

    @property
    def _device(self) -> torch.device:
        return self.stages[0][0].attn.qkv.weight.device

    # ------------------------------------------------------------------ terms

    def _seen(self, what: str, index: int) -> Tensor:
        """The output of a module, in float32 at least; refuses a pass that kept no graph of it."""
        tensor = _at_least_float32(self._noted[f"the {what} of stage {index}"])
        trainable = any(parameter.requires_grad for parameter in self.stages[index][0].parameters())
        if trainable and torch.is_grad_enabled() and not tensor.requires_grad:
            raise InputError(
                "regularizers: no gradient reaches the blocks; run the pass with gradients, and without reentrant "
                "checkpointing (TIMM_REENTRANT_CKPT=0)"
            )
        return tensor

    def _tokens(self, what: str, index: int) -> Tensor:
        """[B, n, C] of a block."""
        tokens = self._seen(what, index)  # [B, H, W, C] or [B, n, C]
        return tokens.flatten(1, 2) if tokens.dim() == 4 else tokens[:, self.prefix_tokens :]

    def _patch(self) -> Tensor:
        return _mean([patch_similarity(self._tokens("last block", index)) for index in range(len(self.stages))])

    def _contrast(self) -> Tensor:
        pairs = [(self._tokens("first block", index), self._tokens("last block", index)) for index in self._deep]
        return _mean([cross_layer_contrast(first, last) for first, last in pairs])

    def _attention(self) -> Tensor:
        layers = [(self._seen("projection", index), self.stages[index][0].attn) for index in self._heads]
        return _mean([attention_similarity(attention_maps(qkv, attention)) for qkv, attention in layers])

    def _weight(self) -> Tensor:
        """The term of queries, keys and values of all blocks."""
        weights = [full_tensor(block.attn.qkv.weight) for stage in self.stages for block in stage]  # [3 C, in]
        return _mean([conditional_orthogonality(_at_least_float32(weight).unflatten(0, (3, -1))) for weight in weights])


def _stages(model: nn.Module) -> list[Any]:
    """The blocks of each stage; a vision transformer is one stage."""
    candidates: list[Any] = [getattr(module, "blocks", None) for module in model.modules()]
    stages = [blocks for blocks in candidates if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks)]
    attentions = [getattr(block, "attn", None) for blocks in stages for block in blocks]
    if not attentions or not all(isinstance(attention, (WindowAttention, Attention)) for attention in attentions):
        raise InputError(
            f"regularizers: {type(model).__name__} is neither an As-ViT nor a vision transformer of timm with its "
            "standard attention; give no regularizers"
        )
    return stages


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()
