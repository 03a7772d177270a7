"""Two-layer networks side by side, and rows dealt to them: y_a = W2_e act(W1_e x_a) for the expert e of row a.

Rows come sorted by expert, as many for each as there are: nothing is padded and nothing is dropped. The plain form is a
loop over experts; where torch has a grouped product for the device and the type, that is used. `dense` computes every
expert for every token instead, which no shape depends on: what torch.func.vmap can run.

Shapes: N tokens, A rows (each a token at one of its experts), E experts, D width, H hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pretrain.init import Fill, constant, declare, normal, residual_weight
from pretrain.ops.activation import ACTIVATIONS

Exchange = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
"""What takes rows to where their experts are: given the experts that are here, rows and counts, it returns outputs."""


class Experts(nn.Module):
    """E networks of one shape, their weights stacked. `activation`: of `ACTIVATIONS`, or `swiglu`."""

    fills: dict[str, Fill]
    exchange: Exchange | None = None
    """Set where other ranks hold other experts (pretrain/ops/expert_parallel.py)."""

    def __init__(self, count: int, *, width: int, hidden: int, depth: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.count, self.first = count, 0
        self.gated = activation == "swiglu"
        self.activation = F.silu if self.gated else ACTIVATIONS[activation]
        inner = 2 * hidden if self.gated else hidden
        self.up = nn.Parameter(torch.empty(count, inner, width))
        self.down = nn.Parameter(torch.empty(count, width, hidden))
        self.up_bias = nn.Parameter(torch.empty(count, inner)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(count, width)) if bias else None
        weights = {"up": normal(width**-0.5), "down": residual_weight(hidden, depth)}
        declare(self, weights | {"up_bias": constant(0.0), "down_bias": constant(0.0)})

    def forward(self, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        """(A, D) outputs of rows sorted by expert. counts_E: how many rows each of all experts has."""
        return self._own(rows_AD, counts_E) if self.exchange is None else self.exchange(self._own, rows_AD, counts_E)

    def dense(self, x_ND: Tensor, gates_NE: Tensor) -> Tensor:
        """(N, D): every expert's output of every token, weighted; most weights are 0."""
        h_ENH = torch.einsum("nd,ehd->enh", x_ND, self.up)
        h_ENH = self._act(h_ENH if self.up_bias is None else h_ENH + self.up_bias[:, None])
        y_END = torch.einsum("enh,edh->end", h_ENH, self.down)
        y_END = y_END if self.down_bias is None else y_END + self.down_bias[:, None]
        return torch.einsum("ne,end->nd", gates_NE, y_END)

    def flops_per_row(self) -> int:
        """Operations of one row at one expert."""
        return 2 * (self.up[0].numel() + self.down[0].numel())

    def keep(self, first: int, last: int) -> None:
        """Keep the experts [first, last) alone, beginning as they would among all; before there is memory."""
        fills = dict(self.fills)
        for name, parameter in list(self.named_parameters(recurse=False)):
            fills[name] = _slice_of(fills[name], tuple(parameter.shape), first)
            setattr(self, name, nn.Parameter(parameter[first:last].detach(), requires_grad=parameter.requires_grad))
        declare(self, fills)
        self.first = first

    def _own(self, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        h_AH = self._act(grouped_linear(rows_AD, self.up, self.up_bias, counts_E))
        return grouped_linear(h_AH, self.down, self.down_bias, counts_E)

    def _act(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(h)
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up


def _slice_of(fill: Fill, shape: tuple[int, ...], first: int) -> Fill:
    """Fills a slice of a tensor of `shape` with what the whole would hold there."""

    def part(tensor: Tensor, generator: torch.Generator) -> Tensor:
        whole = fill(torch.empty(shape, dtype=tensor.dtype, device="cpu"), generator)
        return tensor.copy_(whole[first : first + len(tensor)])

    return part


def grouped_linear(rows_AI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts_E: Tensor) -> Tensor:
    """(A, O): rows sorted by expert times the weights of their experts, in the fastest form the device has."""
    if has_grouped_product(rows_AI, weight_EOI):
        y_AO = F.grouped_mm(rows_AI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
    else:
        y_AO = grouped_linear_naive(rows_AI, weight_EOI, counts_E)
    return y_AO if bias_EO is None else y_AO + bias_EO[experts_of_rows(counts_E, len(rows_AI))]


def grouped_linear_naive(rows_AI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """(A, O): expert by expert; waits for the counts. Where tensors have no values all experts have equally many."""
    many, rest = divmod(len(rows_AI), len(counts_E))
    counts = [many + rest, *[many] * (len(counts_E) - 1)] if isinstance(counts_E, FakeTensor) else counts_E.tolist()
    parts = zip(rows_AI.split(counts), weight_EOI.unbind(0))
    return torch.cat([F.linear(own_AI, weight_OI) for own_AI, weight_OI in parts])


def has_grouped_product(rows_AI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch multiplies such groups at once: on CUDA bf16 on Hopper; rows at multiples of 16 bytes.

    Not on what came after it, where the gradient of a group without rows is not zero (pytorch issue 172439).
    """
    if (
        not hasattr(F, "grouped_mm")
        or isinstance(rows_AI, FakeTensor)
        or any(size * rows_AI.itemsize % 16 for size in weight_EOI.shape[1:])
    ):
        return False
    if rows_AI.is_cuda:
        return rows_AI.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows_AI.device)[0] == 9
    return rows_AI.device.type == "cpu" and rows_AI.dtype in (torch.float32, torch.bfloat16)


def experts_of_rows(counts_E: Tensor, rows: int) -> Tensor:
    """(A,): the expert of each of `rows` sorted rows."""
    numbers_E = torch.arange(len(counts_E), device=counts_E.device)
    return torch.repeat_interleave(numbers_E, counts_E, output_size=rows)


def sorting(keys_A: Tensor) -> tuple[Tensor, Tensor]:
    """The stable order that sorts `keys_A`, and the one that undoes it."""
    order_A = keys_A.argsort(stable=True)
    return order_A, torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=keys_A.device))


def permuted(rows_AD: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
    """rows_AD[order_A]. Its gradient is a permutation too: no sums, so the same on every run, and contiguous, which
    the grouped product's gradient asks for."""
    return _Permuted.apply(rows_AD, order_A, inverse_A)


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_AD: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order_A, inverse_A)
        return rows_AD.index_select(0, order_A)

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        _, inverse_A = ctx.saved_tensors
        return grad_AD.index_select(0, inverse_A), None, None
