"""Linear attention with the Taylor features of the exponential (lucidrains/taylor-series-linear-attention).

    phi(x) = [1, x, x (x) x / sqrt2],      phi(q).phi(k) = 1 + s + s^2 / 2 = ((1 + s)^2 + 1) / 2,      s = q.k
    y = sum_j phi(q).phi(k_j) v_j / sum_j phi(q).phi(k_j)

Every key has a weight of 1/2 or more, so a denominator is never small: it is 0 only where there is no key, and y too.
Sums are of u = (v, 1), multiplied by 0 where there is no key.

Shapes: ... any number of batches, T queries and keys, E width of keys and values, U = E + 1, P = 1 + E + E^2 features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.scan import exact

BLOCK = 16
"""Queries within which `taylor_scan` writes weights out; beyond it keys are summed up."""


def features(x: Tensor) -> Tensor:
    """phi(x): (..., E) to (..., P)."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat((torch.ones_like(x[..., :1]), x, squares), dim=-1)


def feature_count(width: int) -> int:
    """P, of keys of `width`."""
    return 1 + width + width * width


def with_one(v: Tensor, there: Tensor) -> Tensor:
    """u = (v, 1), 0 where there is no key: (..., E) to (..., U). there: (..., 1), broadcast."""
    return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1) * there


def taylor_sums(k: Tensor, u: Tensor) -> Tensor:
    """sum_j phi(k_j) u_j^T, (..., P, U)."""
    return features(k).transpose(-1, -2) @ u


def taylor_read(q: Tensor, sums: Tensor) -> Tensor:
    """y of every query, (..., T, E), from sums over its keys."""
    return _ratio(features(q) @ sums)


def taylor_naive(q: Tensor, k: Tensor, u: Tensor, sees: Tensor) -> Tensor:
    """The equation itself. sees: (..., T, T) bool, true where a query sees a key."""
    return _ratio((_kernel(q, k) * sees) @ u)


def taylor_scan(q: Tensor, k: Tensor, u: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """y of every query over the keys up to its own place and those in `sums`, and the sums after the last: O(T).

    sums: (..., P, U), in fp32 or fp64.
    """
    parts = []
    for q_b, k_b, u_b in zip(*(x.split(BLOCK, dim=-2) for x in (q, k, u))):
        parts.append(_kernel(q_b, k_b).tril() @ u_b + features(q_b) @ sums.to(q.dtype))
        sums = sums + taylor_sums(k_b, u_b).to(exact(q.dtype))
    return _ratio(torch.cat(parts, dim=-2)), sums


def scan_flops(length: int, width: int) -> int:
    """Operations of `taylor_scan` per query on a row of `length`, both halves of a block's matrix."""
    u = width + 1
    return 2 * min(BLOCK, length) * (width + u) + 4 * feature_count(width) * u


def _kernel(q: Tensor, k: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    return 1 + s + s.square() / 2


def _ratio(y_and_total: Tensor) -> Tensor:
    # one key has a total of 1/2 or more: the bound is met only where there is none
    return y_and_total[..., :-1] / y_and_total[..., -1:].clamp(min=0.5)
