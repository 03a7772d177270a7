"""The head: logits of hidden states and their cross-entropy, with or without a feed-forward over the logits.

    z = W x + b,      z' = z + W2 swish(W1 z + b1) + b2,      W2 = b2 = 0 at first: a trained backbone begins as it was

z is linear in x, so that W1 z = (W1 W) x + W1 b, and z' = [W | W2] [x; swish(W1 z + b1)] + b + b2 is a head over wider
vectors: the loss is computed a chunk at a time like any other, and no (N, V) matrix is kept for z or for z'.
With a rank, W1 = Wu Wd is a product of two smaller matrices.
Source: the text of acosharma/elita-transformer (5,000 symbols, 8,192 hidden); the residual is this project's.

Shapes: N vectors, D width, V vocabulary, H hidden width, R rank (or H, where there is none).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import LogitsConfig, ModelConfig
from pretrain.init import constant, declare, linear, normal
from pretrain.ops.loss import cross_entropy


class LogitsFeedForward(nn.Module):
    """Widens a head: vectors (N, D) to (N, D + H), and the matrix (V, D) that reads them to (V, D + H)."""

    def __init__(self, config: LogitsConfig, vocab: int) -> None:
        super().__init__()
        self.down = linear(vocab, config.rank) if config.rank else None
        self.up = linear(config.rank or vocab, config.hidden, bias=True)
        self.out = nn.Linear(config.hidden, vocab)
        declare(self.out, {"weight": constant(0.0), "bias": constant(0.0)})

    def forward(self, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The wider vectors, and the matrix and the bias that give their logits."""
        first_RV = self.up.weight if self.down is None else self.down.weight
        last_V = self.up.bias if self.down is None else None
        y_NR = _composed(x_ND, weight_VD, bias_V, first_RV, last_V)
        h_NH = F.silu(y_NR if self.down is None else self.up(y_NR))
        bias_V = self.out.bias if bias_V is None else bias_V + self.out.bias
        return torch.cat((x_ND, h_NH), dim=-1), torch.cat((weight_VD, self.out.weight), dim=-1), bias_V

    def flops_per_vector(self, width: int) -> int:
        """Operations of a vector; what is done once a batch, W1 W, is not a vector's."""
        vocab, hidden = self.out.weight.shape
        inner = 2 * width * hidden if self.down is None else 2 * self.down.out_features * (width + hidden)
        return inner + 2 * hidden * vocab


class Head(nn.Module):
    """What reads logits off hidden states, by a matrix of its own or, tied, by the one that every call is given."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.width, self.vocab = config.width, vocab
        has_bias = config.bias and not config.tie
        self.weight = None if config.tie else nn.Parameter(torch.empty(vocab, config.width))
        self.bias = nn.Parameter(torch.empty(vocab)) if has_bias else None
        declare(self, {"weight": normal(config.width**-0.5), "bias": constant(0.0)})
        self.feed = LogitsFeedForward(config.logits, vocab) if config.logits.hidden else None

    def forward(self, x_ND: Tensor, tied_VD: Tensor | None, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss, to differentiate, and the loss of each vector's target (N,), as `cross_entropy` has it."""
        return cross_entropy(*self._linear(x_ND, tied_VD), targets_N)

    def logits(self, x_BTD: Tensor, tied_VD: Tensor | None) -> Tensor:
        """(B, T, V)."""
        return F.linear(*self._linear(x_BTD.flatten(0, 1), tied_VD)).unflatten(0, x_BTD.shape[:2])

    def flops_per_token(self) -> int:
        """Operations of one token's logits."""
        own = 2 * self.width * self.vocab
        return own if self.feed is None else own + self.feed.flops_per_vector(self.width)

    def freeze_others(self, model: nn.Module) -> None:
        """Leave of a model only the feed-forward over logits to train."""
        assert self.feed is not None, "the configuration was checked"
        model.requires_grad_(False)
        self.feed.requires_grad_(True)

    def _linear(self, x_ND: Tensor, tied_VD: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vectors, and the matrix and the bias that give their logits."""
        weight_VD = self.weight if tied_VD is None else tied_VD
        assert weight_VD is not None, "a head without a matrix is given one"
        return (x_ND, weight_VD, self.bias) if self.feed is None else self.feed(x_ND, weight_VD, self.bias)


def _composed(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, first_RV: Tensor, last_R: Tensor | None
) -> Tensor:
    """first (weight x + bias) + last, by the cheaper order. (N, R).

    Few vectors go through their logits, which are then fewer numbers than a matrix has; many through one product.
    """
    rank, (vocab, width) = len(first_RV), weight_VD.shape
    if len(x_ND) * vocab * (width + rank) < rank * width * (vocab + len(x_ND)):
        return F.linear(F.linear(x_ND, weight_VD, bias_V), first_RV, last_R)
    if bias_V is not None:
        offset_R = first_RV @ bias_V
        last_R = offset_R if last_R is None else offset_R + last_R
    return F.linear(x_ND, first_RV @ weight_VD, last_R)
