"""Rank correlations of weighted samples, many resamples at a time.

A bootstrap resample of n networks is a weight for each, how often it was drawn. Correlations of all resamples are then
products of matrices: Kendall's tau-b and Spearman's rho are sums over pairs of networks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def worst_last(values: ArrayLike, direction: int = 1) -> Floats:
    """Ranks [n] from 0 = worst, equal values sharing one; what is not finite is worst of all."""
    better = np.asarray(values, dtype=np.float64) * direction  # [n]
    better = np.where(np.isfinite(better), better, -np.inf)
    return np.unique(better, return_inverse=True)[1].astype(np.float64)


def resamples(count: int, number: int, seed: int) -> Floats:
    """Weights [number, count] of bootstrap resamples of ``count`` networks."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), number).astype(np.float64)


def kendall(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Kendall's tau-b of ranks x and y [n] in each resample, weights [B, n] -> [B]; NaN where one is constant."""
    signs_x, signs_y = (np.sign(ranks[:, None] - ranks) for ranks in (x, y))  # [n, n]
    agreeing, pairs_x, pairs_y = (
        ((weights @ matrix) * weights).sum(1)  # [B]
        for matrix in (signs_x * signs_y, np.abs(signs_x), np.abs(signs_y))
    )
    return _ratio(agreeing, np.sqrt(pairs_x * pairs_y))


def spearman(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Spearman's rho of ranks x and y [n] in each resample, weights [B, n] -> [B]; NaN where one is constant."""
    total = weights.sum(1, keepdims=True)  # [B, 1]
    centred = []
    for ranks in (x, y):
        middle = weights @ ((np.sign(ranks - ranks[:, None]) + 1) / 2)  # [B, n]: midranks in the resample
        centred.append(middle - (middle * weights).sum(1, keepdims=True) / total)
    products = [(weights * a * b).sum(1) for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)]
    return _ratio(products[0], np.sqrt(products[1] * products[2]))


def partial(xy: Floats, xz: Floats, yz: Floats) -> Floats:
    """Partial correlation of x and y at equal z, of Kendall's taus as of any correlation; NaN where z decides one."""
    rest = (1 - xz**2) * (1 - yz**2)
    return _ratio(xy - xz * yz, np.sqrt(rest.clip(min=0)))


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 1e-12)
