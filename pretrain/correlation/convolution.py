"""Forms without a (T, T) matrix: channel by channel, values gated by keys are convolved, then gated by queries.

    fft       y_t = q_t (sum_{s <= t} H[t - s] k_s v_s + D v_t),  H[lag] = sum_n a_n sqrt(1 - r_n^2) r_n^lag,
              r = exp(-softplus(lambda)), n < n_exp
    fft_self  y_t = q_t (sum_{s <= t} k_s v_{t-s}) / sqrt(t + 1) + v_t,  s and t counted from the document's start

`fft` is of the family of H3 (arXiv 2212.14052) and Hyena (arXiv 2302.10866): a sum of exponentials is also the
recurrence z_n <- r_n z_n + k v, which is how it decodes and how packed rows are trained, causal to the bit. Rows of one
document use the FFT. The filter of `fft_self` is the document itself, so nothing is forgotten and nothing summed up.

Shapes: B rows, H heads, T tokens of a row or piece, S tokens so far, E width of a head, N exponentials.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.correlation.doubling import running_sums
from pretrain.correlation.form import Form, Heads
from pretrain.init import constant, declare, normal, values
from pretrain.layout import Layout
from pretrain.ops.heads import Cache, empty_cache, extend
from pretrain.ops.scan import exact

LONGEST = 1000.0
"""Tokens after which the slowest exponential begins with 1/e left; the fastest has it after one."""


class Fft(Form):
    """A filter of a few exponentials for every channel."""

    rounding = True

    def __init__(self, heads: Heads, n_exp: int) -> None:
        super().__init__(heads)
        shape = (heads.count, heads.width, n_exp)
        self.mix, self.rate = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.skip = nn.Parameter(torch.empty(shape[:2]))
        rates = values(lambda: first_rates(heads.width * n_exp).view(shape[1:]))
        declare(self, {"mix": normal(n_exp**-0.5), "rate": rates, "skip": constant(1.0)})

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        u = (k * v).to(exact(q.dtype))
        loss_HEN = F.softplus(self.rate.to(u.dtype))
        mix_HEN = self.mix.to(u.dtype) * (-torch.expm1(-2 * loss_HEN)).sqrt()
        if state is None and layout.ramps:
            lag_T11 = torch.arange(u.shape[2], device=u.device)[:, None, None]
            kernel_HTE = ((-lag_T11 * loss_HEN[:, None]).exp() * mix_HEN[:, None]).sum(-1)
            y = convolve(u, kernel_HTE)
        else:
            terms = u[..., None].expand(*u.shape, mix_HEN.shape[-1])
            sums = running_sums(terms, (-loss_HEN).exp()[:, None], layout.pos_BT[:, None, :, None, None], state)
            y = (sums * mix_HEN[:, None]).sum(-1)
            state = None if state is None else sums[:, :, -1]
        return (q * (y + self.skip[:, None] * v)).to(q.dtype), state

    def initial_state(self, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, *self.mix.shape)

    def flops_per_token(self, length: int) -> int:
        return 0

    def state_bytes(self, length: int) -> int:
        return 2 * self.mix.numel()


class FftSelf(Form):
    """Keys convolved with values from the start of the document on. No parameters; decoding needs all of both."""

    rounding = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: Cache | None = None
    ) -> tuple[Tensor, Cache | None]:
        if state is None:
            y = convolve_documents(k, v, layout)
        else:
            state = extend(state, k, v, layout)
            y = convolve_seen(state.k, state.v, layout)
        return q * y + v, state

    def initial_state(self, rows: int, like: Tensor) -> Cache:
        return empty_cache(rows, self.heads.count, self.heads.width, like)

    def flops_per_token(self, length: int) -> int:
        return 0

    def state_bytes(self, length: int) -> int:
        return 2 * 2 * self.heads.count * self.heads.width * length


def first_rates(count: int) -> Tensor:
    """`count` values of lambda whose exponentials have lost all but 1/e after 1 to LONGEST tokens, evenly in ratio."""
    loss = LONGEST ** -torch.linspace(0, 1, count, dtype=torch.float64)
    return loss.expm1().log().float()


def convolve(a_TE: Tensor, b_TE: Tensor) -> Tensor:
    """sum_s a_s b_{t-s} along the dimension before the last, by FFT in fp32 (fp64 for fp64). (..., T, E)."""
    length = a_TE.shape[-2]
    size = 1 << (2 * length - 1).bit_length()
    spectrum = torch.fft.rfft(a_TE, size, dim=-2) * torch.fft.rfft(b_TE, size, dim=-2)
    # copied, so that the padding is let go and channels lie side by side again
    return torch.fft.irfft(spectrum, size, dim=-2)[..., :length, :].contiguous()


def convolve_documents(a_BHTE: Tensor, b_BHTE: Tensor, layout: Layout) -> Tensor:
    """sum_s a_s b_{t-s} / sqrt(t + 1) within each document, t and s counted from its start. (B, H, T, E).

    Packed documents of similar lengths, of more than half a power of two, are laid side by side in a table with a line
    each and share one FFT: as many lines as could fit a row, so that no shape depends on where documents lie.
    """
    length, dtype = a_BHTE.shape[2], a_BHTE.dtype
    a, b = a_BHTE.to(exact(dtype)), b_BHTE.to(exact(dtype))
    norm_BT = (layout.pos_BT + 1).to(a.dtype).rsqrt()
    if layout.ramps:
        return (convolve(a, b) * norm_BT[:, None, :, None]).to(dtype)
    doc_BT = layout.doc_BT - layout.doc_BT[:, :1]
    tokens_BT = torch.zeros_like(doc_BT).scatter_add(1, doc_BT, torch.ones_like(doc_BT)).gather(1, doc_BT)
    total = torch.zeros_like(a)
    for size in (1 << power for power in range((length - 1).bit_length() + 1)):
        lines = length // (size // 2 + 1)
        mine_BT = (tokens_BT > size // 2) & (tokens_BT <= size)
        line_BT = (mine_BT & (layout.pos_BT == 0)).cumsum(1) - 1
        # tokens of all other documents share the place behind the table
        place = torch.where(mine_BT, line_BT * size + layout.pos_BT, lines * size)[:, None, :, None]
        tables = (_laid_out(x, place, lines, size) for x in (a, b))
        total = total + F.pad(convolve(*tables).flatten(2, 3), (0, 0, 0, 1)).take_along_dim(place, dim=2)
    return (total * norm_BT[:, None, :, None]).to(dtype)


def _laid_out(x_BHTE: Tensor, place_B1T1: Tensor, lines: int, size: int) -> Tensor:
    """(B, H, lines, size, E), 0 where no token has its place."""
    table = x_BHTE.new_zeros(*x_BHTE.shape[:2], lines * size + 1, x_BHTE.shape[3])
    laid = table.scatter(2, place_B1T1.expand_as(x_BHTE), x_BHTE)
    return laid[:, :, :-1].unflatten(2, (lines, size))


def convolve_seen(a_BHSE: Tensor, b_BHSE: Tensor, layout: Layout) -> Tensor:
    """`convolve_documents` for the last T of S tokens, each by its sum, O(S E); decoding, and the plain twin."""
    length, pos_BT, dtype = layout.pos_BT.shape[1], layout.pos_BT, a_BHSE.dtype
    a, b, steps = a_BHSE.to(exact(dtype)), b_BHSE.to(exact(dtype)), []
    for t in range(length):
        here = a.shape[2] - length + t
        lag_S = torch.arange(here + 1, device=a.device)
        place_BS = (here - pos_BT[:, t, None] + lag_S).clamp(max=here)
        within_BS = lag_S <= pos_BT[:, t, None]
        mirrored = a[:, :, : here + 1].flip(2) * within_BS[:, None, :, None]
        steps.append((mirrored * b.take_along_dim(place_BS[:, None, :, None], dim=2)).sum(2))
    norm_BT = (pos_BT + 1).to(a.dtype).rsqrt()
    return (torch.stack(steps, dim=2) * norm_BT[:, None, :, None]).to(dtype)
