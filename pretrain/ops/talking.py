"""Talking heads (arXiv 2003.02436): what attention does to scores and weights between its products, across heads.

    S = q k^T / sqrt(E),    S_h + sum_g W_hg S_g

W is 0 where heads do not talk. It needs scores that are written out, so they are kept exact: fp32, fp64 for fp64.

Shapes: B rows, H heads, T queries, S keys, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.scan import exact


def exact_scores(q_BHTE: Tensor, k_BHSE: Tensor) -> Tensor:
    """Scores (B, H, T, S) of queries and keys that may be in a lower precision."""
    kind = exact(q_BHTE.dtype)
    return (q_BHTE.to(kind) * q_BHTE.shape[-1] ** -0.5) @ k_BHSE.to(kind).transpose(-1, -2)


def talk(scores_BHTS: Tensor, weight_HH: Tensor) -> Tensor:
    """Scores or weights after heads have talked: a head where all are 0 stays 0."""
    return scores_BHTS + torch.einsum("hg,bgts->bhts", weight_HH.to(scores_BHTS.dtype), scores_BHTS)


def masked_softmax(scores_BHTS: Tensor, sees: Tensor) -> Tensor:
    """Weights over the keys that a query sees. sees: (B, T, S) bool."""
    return scores_BHTS.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
