"""Normalizations, images, attention, losses, linear algebra, complex numbers: each of one tensor [5, 6]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from curves import INDEX, MASK, TARGET, Case, P, V, W, definite, draw, image, inside, positive, signal, square, volume
from torch import Tensor, nn


def _attention(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x[None, None] * factor for factor in (1.0, 0.5, 2.0))  # [1, 1, 5, 6]
    bias = draw(7, 5, 5).masked_fill(torch.eye(5, dtype=torch.bool), float("-inf"))
    kept = torch.eye(5, dtype=torch.bool) | (draw(8, 5, 5) > 0)
    heads = draw(9, 1, 4, 5, 6)
    attend = F.scaled_dot_product_attention
    return (
        attend(q, k, v, is_causal=True),
        attend(q, k, v, attn_mask=bias, scale=0.3),
        attend(q, k, v, attn_mask=kept),
        attend(q, k, v, attn_mask=kept & (TARGET != 3)[:, None]),  # a query without keys
        attend(q, k, v, attn_mask=(x @ W.T).masked_fill((TARGET == 3)[:, None], float("-inf"))),
        attend(heads * x, (heads * x)[:, :2], heads[:, :2], enable_gqa=True),
        attend(q[..., :3, :], k, v[..., :2]),
        attend(W[None, None], W[None, None], v),
        attend(x, W, x),
    )


torch.manual_seed(0)
MULTIHEAD = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True).double().eval()
LSTM = nn.LSTM(6, 4, num_layers=2, bidirectional=True, proj_size=3).double()
GRU = nn.GRU(6, 4, num_layers=2, batch_first=True, bias=False).double()
RNN = nn.RNN(6, 4, bidirectional=True).double()
RNN_RELU = nn.RNN(6, 4, nonlinearity="relu").double()
LSTM_CELL, GRU_CELL, RNN_CELL = nn.LSTMCell(6, 4).double(), nn.GRUCell(6, 4).double(), nn.RNNCell(6, 4).double()


CASES: dict[str, Case] = {
    # normalization
    "instance_norm": lambda x: (
        F.instance_norm(image(x), weight=W[0, :2], bias=W[1, :2]),
        torch.instance_norm(signal(x), None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "batch_norm": lambda x: (
        F.batch_norm(x, W[0], P[0], W[2], W[3]),
        torch.batch_norm(x, W[2], W[3], W[0], P[0], False, 0.1, 1e-5, False),
        F.batch_norm(x, None, None, W[2], training=True),
        F.batch_norm(image(x), None, None, training=True),
    ),
    "native_batch_norm": lambda x: (
        torch.native_batch_norm(x, W[2], W[3], None, None, True, 0.1, 1e-5),
        torch.native_batch_norm(x, W[2], W[3], W[0], P[0], False, 0.1, 1e-5),
        torch.ops.aten.native_batch_norm(image(x), W[0, :2], None, None, None, True, 0.1, 1e-5),
    ),
    "layer_norm": lambda x: (
        F.layer_norm(x, (6,), x[0], W[1]),
        torch.layer_norm(x, (5, 6), W),
        F.layer_norm(W, (6,), x[0], x[1]),
    ),
    "native_layer_norm": lambda x: (
        torch.native_layer_norm(x, (6,), W[0], W[1], 1e-5),
        torch.ops.aten.native_layer_norm(x, (5, 6), None, None, 1e-5),
    ),
    "group_norm": lambda x: (
        F.group_norm(image(x), 2, W[0, :2], W[1, :2]),
        torch.group_norm(x.reshape(1, 6, 5), 3, None, None),
        F.group_norm(image(x), 1, x[0, :2]),
    ),
    "native_group_norm": lambda x: torch.native_group_norm(image(x), W[0, :2], W[1, :2], 1, 2, 15, 1, 1e-5),
    "rms_norm": lambda x: (F.rms_norm(x, (6,), W[0]), F.rms_norm(x, (6,), x[0]), torch.rms_norm(x, (5, 6))),
    "normalize": lambda x: (F.normalize(x), F.normalize(x, p=3, dim=0), F.normalize(x, 1.0)),
    "local_response_norm": lambda x: F.local_response_norm(image(x), 2),
    "weight_norm": lambda x: torch._weight_norm(x, positive(x[:, :1]), 0),
    "softmax": lambda x: (
        x.softmax(0),
        F.softmax(x, 1, 3, torch.float64),
        torch.softmax(x, 1, torch.float64),
        F.softmin(x, 0),
        F.log_softmax(x, -1),
        torch.special.softmax(x, 0),
        torch.special.log_softmax(x, 1),
        F.gumbel_softmax(x, dim=1),
        x[0, 0].softmax(0),
    ),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "dropout": lambda x: (
        F.dropout(x, 0.5, training=False),
        F.dropout(x, 0.5),
        F.alpha_dropout(x, 0.5, False),
        torch.dropout(x, 0.2, False),
    ),
    "threshold": lambda x: (
        F.threshold(x, 0.1, 2.0),
        F.prelu(x, torch.tensor([0.3]).double()),
        F.prelu(W, x[0, :1]),
        F.softplus(x, 3, 0.5),
    ),
    # images
    "max_pool": lambda x: (
        F.max_pool1d(signal(x), 3, 2, 1),
        F.max_pool2d(image(x), 2, ceil_mode=True),
        F.max_pool3d(volume(x), 2, 1),
        F.max_pool2d(image(x)[0], 2, return_indices=True),
    ),
    "avg_pool": lambda x: (
        F.avg_pool1d(signal(x), 3, 2, 1),
        F.avg_pool2d(image(x), 2, 1, 1, False, False),
        F.avg_pool3d(volume(x), 2),
        F.lp_pool2d(positive(image(x)), 2.0, 2),
    ),
    "adaptive_pool": lambda x: (
        F.adaptive_avg_pool2d(image(x), (2, 3)),
        F.adaptive_max_pool2d(image(x), 2),
        F.adaptive_avg_pool1d(signal(x), 4),
        F.adaptive_max_pool1d(signal(x), 4),
        F.adaptive_avg_pool3d(volume(x), (1, 2, 2)),
    ),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(
        image(x), 2, (1, 2), _random_samples=torch.full((1, 2, 2), 0.5).double()
    ),
    "max_unpool2d": lambda x: F.max_unpool2d(
        image(x)[..., :2, :2], torch.tensor([[[[0, 1], [1, 5]], [[0, 3], [4, 7]]]]), 2
    ),
    "interpolate": lambda x: (
        *(
            F.interpolate(image(x), scale_factor=1.7, mode=mode, antialias=mode == "bilinear")
            for mode in ("nearest", "bilinear", "bicubic", "area", "nearest-exact")
        ),
        *(
            F.interpolate(signal(x), 7, mode="linear", align_corners=True),
            F.interpolate(volume(x), (3, 3, 4), mode="trilinear"),
        ),
    ),
    "grid_sample": lambda x: tuple(
        F.grid_sample(image(x), inside(draw(5, 1, 3, 4, 2)) * 1.3, mode, padding, align_corners=corners)
        for mode, padding, corners in (
            ("bilinear", "zeros", False),
            ("bicubic", "border", True),
            ("nearest", "reflection", False),
        )
    ),
    "grid_sample.grid": lambda x: F.grid_sample(
        draw(6, 1, 2, 6, 7), inside(x).reshape(1, 3, 5, 2), align_corners=False
    ),
    "affine_grid": lambda x: F.affine_grid(x[:2, :3][None], [1, 1, 3, 4], align_corners=False),
    "pad": lambda x: (
        *(F.pad(image(x), (1, 2, 1, 1), mode) for mode in ("constant", "reflect", "replicate", "circular")),
        F.pad(x, (1, 1), value=2.0),
        torch.constant_pad_nd(x, (1, 1), 3.0),
    ),
    "fold": lambda x: (F.unfold(image(x), 2, padding=1), F.fold(x.reshape(1, 6, 5), (2, 7), (2, 3))),
    "pixel_shuffle": lambda x: (
        F.pixel_shuffle(x[:4].reshape(1, 4, 2, 3), 2),
        F.pixel_unshuffle(x[:4].reshape(1, 1, 4, 6), 2),
        F.channel_shuffle(image(x), 2),
    ),
    # attention and recurrence
    "attention": lambda x: _attention(x),
    "attention.moving mask": lambda x: F.scaled_dot_product_attention(
        x[None, None], W[None, None], x[None, None], attn_mask=x @ W.T, scale=0.4
    ),
    "multihead": lambda x: nn.MultiheadAttention.forward(MULTIHEAD, x[None], x[None], x[None]),
    "lstm": lambda x: LSTM(
        x[:, None].expand(5, 2, 6),
        (x[:4, :3].reshape(4, 1, 3).expand(4, 2, 3), W[:4, :4].reshape(4, 1, 4).expand(4, 2, 4)),
    ),
    "gru": lambda x: GRU(x[None]),
    "rnn": lambda x: (RNN(x), nn.RNN.forward(RNN_RELU, x)),
    "cells": lambda x: (LSTM_CELL(x), GRU_CELL(x, x[:, :4]), RNN_CELL(x[0])),
    "embedding": lambda x: (F.embedding(INDEX, x, padding_idx=0), torch.embedding(x, INDEX)),
    # losses
    "cross_entropy": lambda x: (
        F.cross_entropy(x, TARGET),
        F.cross_entropy(x, TARGET, W[0].abs(), ignore_index=1, label_smoothing=0.1),
        F.cross_entropy(x, P),
        F.nll_loss(x, TARGET),
        F.nll_loss(x.log_softmax(1), TARGET, P[0], reduction="none"),
    ),
    "kl_div": lambda x: (
        F.kl_div(x, P),
        F.kl_div(x, x.softmax(1), reduction="batchmean", log_target=False),
        F.kl_div(W, positive(x)),
    ),
    "binary_cross_entropy": lambda x: (
        F.binary_cross_entropy(x.sigmoid(), MASK.double()),
        F.binary_cross_entropy(x.sigmoid(), P.sigmoid(), P),
    ),
    "other losses": lambda x: (
        F.poisson_nll_loss(x, P),
        F.gaussian_nll_loss(x, W, positive(x)),
        F.triplet_margin_loss(x, W, V),
        F.margin_ranking_loss(x[0], W[0], W[1].sign()),
        F.cosine_embedding_loss(x, W, TARGET.sign() * 2 - 1),
        F.triplet_margin_with_distance_loss(x, W, V),
    ),
    "distances": lambda x: (
        torch.cdist(x, W),
        torch.cdist(W, x, p=1.0),
        torch.cdist(x, x[:2] + 1, p=3),
        F.pdist(x),
        F.pairwise_distance(x, W),
        F.cosine_similarity(x, W[0], dim=-1),
    ),
    # linear algebra
    "det": lambda x: (
        torch.det(square(x)),
        torch.linalg.det(square(x)),
        torch.logdet(definite(x)),
        torch.linalg.slogdet(square(x)),
    ),
    "inverse": lambda x: (
        torch.inverse(square(x)),
        torch.linalg.inv_ex(square(x)),
        torch.linalg.pinv(x),
        torch.pinverse(x),
        torch.linalg.pinv(definite(x), hermitian=True),
    ),
    "solve": lambda x: (
        torch.linalg.solve(square(x), x),
        torch.linalg.solve(square(W), x),
        torch.linalg.solve_ex(square(x), W),
        torch.linalg.lstsq(x.T, W.T),
        torch.linalg.tensorsolve(square(x), x[:, 0]),
    ),
    "cholesky": lambda x: (
        torch.linalg.cholesky(definite(x)),
        torch.linalg.cholesky(definite(x), upper=True),
        torch.linalg.cholesky_ex(definite(x)),
    ),
    "cholesky.one triangle": lambda x: (
        torch.linalg.cholesky(square(x) + 9 * torch.eye(5)),
        torch.linalg.eigh(square(x), UPLO="U")[0],
        torch.linalg.eigvalsh(square(x)),
    ),
    "cholesky_inverse": lambda x: (torch.cholesky_inverse(square(x)), torch.cholesky_inverse(square(x), upper=True)),
    "cholesky_solve": lambda x: (
        torch.cholesky_solve(x, square(W)),
        torch.cholesky_solve(W, square(x)),
        torch.cholesky_solve(W, square(x), upper=True),
    ),
    "triangular": lambda x: (
        torch.linalg.solve_triangular(square(x), x, upper=True),
        torch.triangular_solve(x, square(x), upper=False),
    ),
    "factors": lambda x: (
        torch.linalg.qr(x),
        torch.linalg.qr(x, mode="r"),
        torch.linalg.lu(square(x)),
        torch.linalg.lu_factor(square(x))[0],
        torch.linalg.lu_solve(*torch.linalg.lu_factor(square(x)), W),
    ),
    "svd": lambda x: (torch.linalg.svdvals(x), torch.linalg.svd(x, full_matrices=False), torch.svd(x)[1]),
    "eigen": lambda x: (
        torch.linalg.eigh(definite(x)),
        torch.linalg.eigvalsh(definite(x)),
        torch.linalg.eigvals(square(x)),
    ),
    "matrix functions": lambda x: (
        torch.matrix_exp(square(x) / 4),
        torch.linalg.matrix_power(square(x), 3),
        torch.linalg.matrix_power(square(x), -2),
        torch.linalg.cond(square(x)),
        torch.linalg.vander(x[0]),
    ),
    "norms": lambda x: (
        torch.linalg.norm(x),
        torch.linalg.norm(x, "nuc"),
        torch.linalg.matrix_norm(x, 2),
        torch.linalg.vector_norm(x, 3, dim=1),
        torch.linalg.norm(x, 1),
        torch.linalg.norm(x, float("inf")),
    ),
    "householder_product": lambda x: torch.linalg.householder_product(x.T, x[0, :5]),
    # complex numbers
    "fft": lambda x: (
        torch.fft.fft(x),
        torch.fft.rfft2(x),
        torch.fft.irfft(torch.fft.rfft(x) * 2),
        torch.fft.fftshift(x),
        torch.fft.ifftn(x),
        torch.fft.hfft(x),
    ),
    "stft": lambda x: torch.istft(
        torch.stft(x.flatten(), 8, window=torch.hann_window(8).double(), return_complex=True) * 2,
        8,
        window=torch.hann_window(8).double(),
    ),
    "complex": lambda x: (
        torch.complex(x, W),
        torch.polar(positive(x), x),
        torch.view_as_complex(x.reshape(5, 3, 2)),
        (x + 1j * W).abs(),
        (x * 1j).exp().angle(),
        (x + 1j) @ (W.T + 2j),
        (x + 1j).conj().real,
        (x * (2 + 1j)).imag,
        (x + 1j).sgn(),
        (x + 2j).log(),
        (x + 2j) ** 3,
    ),
}
