"""Choosing k of n by coordinate descent: gates that differentiate, each at most 1, and k in sum.

    a = 0,  b = -s;   again and again   a = eps (log k - logsumexp((s + b) / eps)),   b = -relu(s + a)
    gate = exp((s + a + b) / eps)

A constant added to all scores changes a alone, so they are taken relative to the k-th largest: then nearly the right
ones are cut to 1 from the first pass on. Without it, scores some 30 eps apart leave several times k gates at 1 after 20
passes.

Each pass is an exact maximisation over a, then over b, of the dual of: highest sum of s times gate, plus eps times the
entropy, over gates of at most 1 that sum to k (Wright, arXiv 1502.04759, as used by CoLT5, arXiv 2303.09752).

Shapes: ... any number of batches, S candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.scan import exact

EPS = 0.1
"""How soft the choice is: scores that differ by it have gates that differ by a factor of e, below 1."""


def coordinate_descent(s: Tensor, there: Tensor, k: float, iterations: int) -> Tensor:
    """Gates of candidates by their scores s (..., S). there: bool, who is a candidate; all are chosen if they are few.

    Computed in fp32 (fp64 for fp64) and of that type. Each row by itself; one without candidates is not allowed.
    """
    s = s.to(exact(s.dtype))
    largest = s.masked_fill(~there, -torch.inf).topk(min(int(k), s.shape[-1])).values.detach()
    s = s - largest.masked_fill(largest == -torch.inf, torch.inf).amin(-1, keepdim=True)
    log_k = there.sum(-1, keepdim=True).to(s.dtype).clamp(max=k).log()
    b = -s
    for _ in range(iterations):
        scaled = ((s + b) / EPS).masked_fill(~there, -torch.inf)
        a = EPS * (log_k - scaled.logsumexp(-1, keepdim=True))
        b = -(s + a).relu()
    return ((s + a + b) / EPS).exp().masked_fill(~there, 0)
