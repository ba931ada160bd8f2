"""Modules that are unusual in one way each, for the NTK's tests."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ntk_oracle import Of, linears, parameter, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def before_and_after(layer: nn.Module, channels: int = 3) -> nn.Sequential:
    """Layers that have rules on both sides of one that is unusual."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.GELU(), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(5)
    )


class Doubled(torch.autograd.Function):
    """A function of an input and a parameter with its own backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight) * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight, 2 * gradient.flatten(0, -2).T @ x.flatten(0, -2)


def gradient_of_energy(m: nn.Module, x: Tensor) -> Tensor:
    """A network that differentiates itself."""
    with torch.enable_grad():
        x = tokens(x).detach().requires_grad_()
        return torch.autograd.grad(m.a(x).tanh().square().sum(), x, create_graph=True)[0].mean(1)


def tied() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return Of(lambda m, x: m.second(torch.tanh(m.first(tokens(x)))).mean(1), first=first, second=second)


def called_twice(x_of_second: Callable[[Tensor], Tensor]) -> nn.Module:
    return Of(lambda m, x: m.linear(x_of_second(torch.tanh(m.linear(tokens(x))))).mean(1), linear=nn.Linear(8, 8))


def frozen(name: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 5))
    model.get_parameter(name).requires_grad_(False)
    return model


def batch_statistics(**options: object) -> nn.Module:
    return before_and_after(nn.BatchNorm2d(4, **options), 4)


def written_in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = m.conv(x)  # [B, 4, 8, 8]
    x[:, :, :2] = 0.5
    x[:, 1].mul_(2.0)
    x.view(x.shape[0], -1)[:, -7:].mul_(-1.0)
    return m.head(F.relu_(x).flatten(1))


def looped(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([m.head(torch.tanh(m.conv(image)).flatten()) for image in x])


def tokens_first(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.linear(tokens(x).transpose(0, 1)))).mean(0)


def checkpointed(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(tokens(x))  # reentrant checkpoints need an input with a gradient
    for _ in range(2):
        x = checkpoint(m.block, x, use_reentrant=m.reentrant)
        x = checkpoint(lambda y: torch.tanh(y @ m.own) ** 2, x, use_reentrant=m.reentrant)
    return m.head(checkpoint_sequential(m.chain, 2, x, use_reentrant=m.reentrant)).mean(1)


def checkpoints(reentrant: bool) -> nn.Module:
    block, chain = (nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 8)) for _ in range(2))
    return Of(
        checkpointed,
        first=nn.Linear(8, 8),
        block=block,
        chain=chain,
        own=parameter(8, 8),
        head=nn.Linear(8, 3),
        reentrant=reentrant,
    )


class Cached(nn.Module):
    """Keeps what it computes from a parameter until it is trained, as timm's attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_table = parameter(5, 8)
        self.linear = nn.Linear(8, 8)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.weight_table[[0, 1, 1, 4] * 6]  # [24, 8]
        return (torch.tanh(self.linear(tokens(x))) * self.cache["bias"]).mean(1)


def attention(**options: object) -> nn.Module:
    attend = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    return Of(
        lambda m, x: m.attend(*[m.first(tokens(x))] * 3, need_weights=False)[0].mean(1),
        first=nn.Linear(8, 8),
        attend=attend,
    )


def recurrent(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.recurrent(m.first(tokens(x)))[0][:, -1])


def pooled_by_a_query(m: nn.Module, x: Tensor) -> Tensor:
    """The query is a parameter that meets a weight before it meets a sample; 4 rows, twice the probe's samples."""
    keys = m.key(tokens(x))  # [B, 24, 8]
    return (torch.softmax(m.to_query(m.query_weight) @ keys.transpose(1, 2), -1) @ keys).flatten(1)


def constant_table(m: nn.Module, x: Tensor) -> Tensor:
    """A bias from a small network on constant coordinates, an even number of them."""
    bias = m.second(torch.tanh(m.first(torch.linspace(-1, 1, 24 * 2, dtype=x.dtype).view(24, 2))))  # [24, 8]
    return torch.tanh(m.linear(tokens(x)) + bias).mean(1)


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([m.cls_weight.expand(x.shape[0], -1, -1), m.first(tokens(x))], 1) + m.position_weight
    return m.norm(torch.tanh(m.second(x)))[:, 0]


def mixed(m: nn.Module, x: Tensor) -> Tensor:
    """Features of each sample depend on the other samples."""
    x = torch.tanh(m.first(tokens(x)).mean(1))
    return m.second(torch.tanh(m.middle(x) - x.mean(0)))


def over_the_batch(m: nn.Module, x: Tensor) -> Tensor:
    """Only earlier samples reach later ones."""
    return m.second(torch.tanh(m.first(x.flatten(1)).cumsum(0)))


def without_gradient(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(m.gate(tokens(x)))
    return (m.linear(tokens(x)) * gate + m.other(tokens(x)).detach()).mean(1)


def autocast(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(tokens(x))
    with torch.autocast("cpu", torch.bfloat16):
        x = m.second(x).tanh()
    return x.mean(1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "same": lambda: before_and_after(nn.Conv2d(3, 4, 4, padding="same")),
    "same, dilated": lambda: before_and_after(nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(1, 2), bias=False)),
    "valid": lambda: before_and_after(nn.Conv2d(3, 4, 3, padding="valid")),
    "same, first": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.GELU(), nn.Flatten(), nn.Linear(256, 5)
    ),
    "circular": lambda: before_and_after(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
    "reflect, strided": lambda: before_and_after(nn.Conv2d(3, 4, 3, stride=(2, 1), padding=2, padding_mode="reflect")),
    "grouped": lambda: before_and_after(nn.Conv2d(6, 9, 3, groups=3, stride=2), 6),
    "depthwise, dilated": lambda: before_and_after(nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=False), 4),
    "transposed": lambda: before_and_after(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), 4),
    "1-D": lambda: Of(
        lambda m, x: m.conv(torch.tanh(m.first(tokens(x)))).mean(2), first=nn.Linear(8, 8), conv=nn.Conv1d(24, 6, 3)
    ),
    "3-D": lambda: Of(
        lambda m, x: m.conv(m.first(x)[:, None]).flatten(1), first=nn.Conv2d(3, 4, 3), conv=nn.Conv3d(1, 2, 3)
    ),
    "conv on pieces": lambda: Of(
        lambda m, x: m.conv(x.view(-1, 3, 4, 8)).tanh().view(x.shape[0], -1), conv=nn.Conv2d(3, 4, 3)
    ),
    "unfold": lambda: Of(
        lambda m, x: m.head(F.unfold(m.conv(x), 2).transpose(1, 2).tanh()).mean(1),
        conv=nn.Conv2d(3, 2, 3),
        head=nn.Linear(8, 3),
    ),
    "parameter outside": lambda: Of(
        lambda m, x: torch.tanh(tokens(x) @ m.weight + m.shift).mean(1), weight=parameter(8, 6), shift=parameter(6)
    ),
    "weight of another module": lambda: Of(
        lambda m, x: F.linear(torch.tanh(m.a(tokens(x))), m.a.weight.t(), m.b.bias).mean(1), **linears(a=8, b=8)
    ),
    "twice": lambda: called_twice(lambda x: x),
    "twice, other tokens": lambda: called_twice(lambda x: x[:, ::5]),
    "twice, other layout": lambda: called_twice(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "twice, once unknown": lambda: Of(
        lambda m, x: m.linear(torch.einsum("btc,dc->btd", tokens(x), m.linear.weight)).mean(1), linear=nn.Linear(8, 8)
    ),
    "tied": tied,
    "frozen weight": lambda: frozen("0.weight"),
    "frozen bias": lambda: frozen("4.bias"),
    "frozen norm": lambda: frozen("1.weight"),
    "batch statistics": lambda: batch_statistics(track_running_stats=False),
    "running statistics": batch_statistics,
    "batch norm of tokens": lambda: Of(
        lambda m, x: m.norm(m.a(tokens(x)).flatten(0, 1)).tanh().view(x.shape[0], -1),
        norm=nn.BatchNorm1d(8),
        **linears(a=8),
    ),
    "group norm": lambda: before_and_after(nn.GroupNorm(2, 4, eps=1e-3), 4),
    "instance norm": lambda: before_and_after(nn.InstanceNorm2d(4, affine=True), 4),
    "rms norm": lambda: Of(lambda m, x: m.norm(m.a(tokens(x))).tanh().mean(1), norm=nn.RMSNorm(8), **linears(a=8)),
    "layer norm of maps": lambda: before_and_after(nn.LayerNorm((8, 8), elementwise_affine=True), 4),
    "layer norm without bias": lambda: before_and_after(nn.LayerNorm(8, bias=False), 4),
    "in place after the first": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)
    ),
    "in place everywhere": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Hardswish(inplace=True),
        nn.GroupNorm(2, 4),
        nn.ELU(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.Flatten(),
        nn.Linear(144, 5),
        nn.SiLU(inplace=True),
    ),
    "in place to views": lambda: Of(written_in_place, conv=nn.Conv2d(3, 4, 3, padding=1), head=nn.Linear(256, 3)),
    "in-place sum": lambda: Of(
        lambda m, x: m.a(tokens(x)).add_(m.shift_weight).mul_(m.scale_weight).tanh().mean(1),
        shift_weight=parameter(8),
        scale_weight=parameter(24, 1),
        **linears(a=8),
    ),
    "residual in place": lambda: Of(
        lambda m, x: (lambda y: y.add_(torch.tanh(m.b(y.clone()))))(m.a(tokens(x))).mean(1), **linears(a=8, b=8)
    ),
    "checkpoints": lambda: checkpoints(reentrant=False),
    "reentrant checkpoints": lambda: checkpoints(reentrant=True),
    "cached": Cached,
    "attention": attention,
    "attention, own biases": lambda: attention(add_bias_kv=True, kdim=8, vdim=8),
    "transformer layer": lambda: Of(
        lambda m, x: m.layer(m.a(tokens(x))).mean(1),
        layer=nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        **linears(a=8),
    ),
    "lstm": lambda: Of(
        recurrent,
        first=nn.Linear(8, 4),
        recurrent=nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True),
        head=nn.Linear(10, 3),
    ),
    "gru": lambda: Of(recurrent, first=nn.Linear(8, 4), recurrent=nn.GRU(4, 5, batch_first=True), head=nn.Linear(5, 3)),
    "embedding": lambda: Of(
        lambda m, x: torch.tanh(m.a(tokens(x)) + m.embedding((tokens(x)[..., 0] > 0).long())).mean(1),
        embedding=nn.Embedding(2, 8),
        **linears(a=8),
    ),
    "embedding of positions": lambda: Of(
        lambda m, x: torch.tanh(m.a(tokens(x)) + m.embedding(torch.arange(24))).mean(1),
        embedding=nn.Embedding(24, 8),
        **linears(a=8),
    ),
    "query": lambda: Of(pooled_by_a_query, query_weight=parameter(4, 8), **linears(key=8, to_query=8)),
    "constant table": lambda: Of(constant_table, first=nn.Linear(2, 4), second=nn.Linear(4, 8), linear=nn.Linear(8, 8)),
    "class token": lambda: Of(
        class_token,
        cls_weight=parameter(1, 1, 8),
        position_weight=parameter(1, 25, 8),
        norm=nn.LayerNorm(8),
        **linears(first=8, second=8),
    ),
    "scalars": lambda: Of(
        lambda m, x: (m.temperature_weight.exp() * m.a(tokens(x)) * m.scale_weight + 2 * m.offset).tanh().mean(1),
        temperature_weight=parameter(),
        scale_weight=parameter(),
        offset=parameter(1),
        **linears(a=8),
    ),
    "tokens first": lambda: Of(tokens_first, linear=nn.Linear(8, 8), head=nn.Linear(8, 3)),
    "loop over samples": lambda: Of(looped, conv=nn.Conv2d(3, 4, 3), head=nn.Linear(144, 3)),
    "samples mixed": lambda: Of(mixed, **linears(first=8, middle=8, second=4)),
    "earlier samples": lambda: Of(over_the_batch, first=nn.Linear(192, 8), second=nn.Linear(8, 3)),
    "half without gradient": lambda: Of(without_gradient, **linears(gate=8, linear=8, other=8)),
    "weight norm": lambda: before_and_after(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral norm": lambda: before_and_after(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    "orthogonal": lambda: before_and_after(parametrizations.orthogonal(nn.Linear(8, 8))),
    "weight norm by a hook": lambda: before_and_after(weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral norm by a hook": lambda: before_and_after(spectral_norm(nn.Conv2d(3, 4, 3))),
    "bilinear": lambda: Of(
        lambda m, x: m.bilinear(m.a(tokens(x)), tokens(x)).mean(1), bilinear=nn.Bilinear(8, 8, 3), **linears(a=8)
    ),
    "prelu": lambda: before_and_after(nn.PReLU(4), 4),
    "function of one's own": lambda: Of(
        lambda m, x: Doubled.apply(torch.tanh(m.a(tokens(x))), m.weight).mean(1), weight=parameter(6, 8), **linears(a=8)
    ),
    "function of one's own, and a rule": lambda: Of(
        lambda m, x: m.a(Doubled.apply(torch.tanh(m.a(tokens(x))), m.a.weight)).mean(1), **linears(a=8)
    ),
    "scripted": lambda: before_and_after(torch.jit.script(nn.Conv2d(3, 4, 3))),
    "scripted and copied": lambda: copy.deepcopy(before_and_after(torch.jit.script(nn.Conv2d(3, 4, 3)))),
    "all of it scripted and copied": lambda: copy.deepcopy(
        copy.deepcopy(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5))))
    ),
    "a gradient inside": lambda: Of(gradient_of_energy, a=nn.Linear(8, 5)),
    "views": lambda: Of(
        lambda m, x: m.a(tokens(x)).transpose(1, 2)[:, 1:, ::2].unsqueeze(1).expand(-1, 2, -1, -1), **linears(a=8)
    ),
    "weight under another shape": lambda: Of(
        lambda m, x: F.conv2d(x, m.weight.view(4, 3, 2, 2), m.weight_b.flatten()).tanh().flatten(1),
        weight=parameter(4, 12),
        weight_b=parameter(2, 2),
    ),
    "standardised weight": lambda: Of(
        lambda m, x: (
            F.conv2d(
                m.conv(x),
                F.batch_norm(m.weight.reshape(1, 4, -1), None, None, m.gain.view(-1), training=True).reshape_as(
                    m.weight
                ),
            )
            .tanh()
            .flatten(1)
        ),
        conv=nn.Conv2d(3, 3, 3),
        weight=parameter(4, 3, 3, 3),
        gain=parameter(4, 1, 1, 1),
    ),
    "lock": lambda: Of(
        lambda m, x: m.a(tokens(x)).mean(1), lock=threading.Lock(), cache=[threading.Lock()], **linears(a=8)
    ),
}


def build(name: str) -> nn.Module:
    model = MODULES[name]().double()
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64))  # lazy layers
    return model
