"""Every torch function is propagated right or refused by name: float64, against finite differences along the curve."""

from __future__ import annotations

import pytest
import taylor_functions
import taylor_network_functions
import torch
import torch.nn.functional as F
from curves import (
    INDEX,
    TARGET,
    Case,
    P,
    W,
    check,
    definite,
    directions,
    draw,
    image,
    positive,
    square,
    volume,
)
from taylor_network_functions import LSTM
from torch import nn

import asvit_fast as af
from asvit_fast.taylor import TaylorError

CASES = taylor_functions.CASES | taylor_network_functions.CASES

REFUSED: dict[str, Case] = {
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: torch.normal(x, 1.0),
    "item": lambda x: x / x.max().item(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "tolist": lambda x: x * x[0].tolist()[0],
    "igamma": lambda x: torch.igamma(positive(x), P),
    "special_zeta": lambda x: torch.special.zeta(positive(x) + 1, 2.0),
    "special_bessel_j0": torch.special.bessel_j0,
    "special_airy_ai": torch.special.airy_ai,
    "special_chebyshev_polynomial_t": lambda x: torch.special.chebyshev_polynomial_t(x, 3),
    "unique": torch.unique,
    "unique_consecutive": torch.unique_consecutive,
    "scatter_": lambda x: W.clone().scatter_(0, INDEX, x),
    "ctc_loss": lambda x: F.ctc_loss(x[:, None].log_softmax(-1), torch.tensor([[1, 2]]), (5,), (2,)),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, TARGET),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, torch.randint(0, 6, (5, 6))),
    "embedding_bag": lambda x: F.embedding_bag(INDEX, x),
    "embedding with max_norm": lambda x: F.embedding(INDEX, x, max_norm=1.0),
    "linalg_eig": lambda x: torch.linalg.eig(square(x)),
    "linalg_ldl_factor": lambda x: torch.linalg.ldl_factor(definite(x)),
    "geqrf": torch.geqrf,
    "histogram": lambda x: torch.histogram(x, 3),
    "as_strided": lambda x: torch.as_strided(x, (2, 2), (1, 2)),
    "resize": lambda x: (x * 1).resize_(3, 10),
    "linalg_svd": lambda x: torch.linalg.svd(x),
    "gumbel_softmax with hard": lambda x: F.gumbel_softmax(x, hard=True),
    "fake_quantize_per_tensor_affine": lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -9, 9),
    "uniform_": lambda x: (x * 1).uniform_(),
    "exponential_": lambda x: (x * 1).exponential_(),
    "grid_sample of volumes": lambda x: F.grid_sample(volume(x), draw(5, 1, 2, 2, 2, 3), align_corners=False),
    "running statistics": lambda x: F.batch_norm(x, W[0] * 1, P[0] * 1, training=True),
    "instance_norm": lambda x: F.instance_norm(image(x), W[0, :2] * 1, P[0, :2] * 1),
    "lstm with dropout": lambda x: nn.LSTM(6, 4, 2, dropout=0.5).double()(x),
    "PackedSequence": lambda x: LSTM(nn.utils.rnn.PackedSequence(x, torch.tensor([3, 2]))),
    "pack_padded_sequence": lambda x: nn.utils.rnn.pack_padded_sequence(x[:, None], torch.tensor([5])),
    "add_": lambda x: W.clone().add_(x),
    "mul_": lambda x: W.clone().mul_(x),
    "copy_": lambda x: W.clone().copy_(x),
    "clamp_": lambda x: W.clone().clamp_(min=x),
    "__setitem__": lambda x: W.clone().__setitem__(0, x[0]),
    "index_add_": lambda x: W.clone().index_add_(0, INDEX[0], x[:3]),
    r"mul\(out": lambda x: torch.mul(x, x, out=W.clone()),
    "register_hook": lambda x: (x.register_hook(print), x)[1],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_right(name: str) -> None:
    with torch.no_grad():
        check(CASES[name], *directions())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name(name: str) -> None:
    x, dx, ddx = directions()
    for propagate in (lambda: af.jet(REFUSED[name], x, dx, ddx), lambda: af.jvp(REFUSED[name], x, dx)):
        with pytest.raises(TaylorError, match=name) as refusal:
            propagate()
        assert "\n" not in str(refusal.value)
