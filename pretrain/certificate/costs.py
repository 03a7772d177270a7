"""What every mixer promises of its costs: its formulas are held to operations and bytes that are counted.

Training on large rows is counted on fake tensors, which have shapes and types but no memory.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.activations import Saved
from pretrain.certificate.trial import LENGTH, WIDTH, Candidate, Measured, Refused, general, noise
from pretrain.layout import Layout
from pretrain.mixer import TokenMixer

NEAR, SLOPE = 0.02, 0.15
LENGTHS, STATE_LENGTHS = (2048, 4096), (512, 1024)
TIMED = (512, 2048)
_STATED_BY = {
    "operations": "flops_per_token, or halved_flops_per_token",
    "the state": "state_bytes",
    "what training keeps": "`dense`, which says whether a (T, T) matrix is kept",
}
_MANY_ROWS = 32
"""So many that a form chosen for small scores is chosen at none of these lengths; fake rows are free."""


def flops(candidate: Candidate) -> Measured:
    """`flops_per_token` (and what causality halved) are the operations that matrix products do."""
    mix, worst = candidate.mixer(), 0.0
    for length in (16, LENGTH, 96):
        counted = _flops(mix, noise(2, length, WIDTH)) / (2 * length)
        stated = mix.flops_per_token(length) + mix.halved_flops_per_token(length)
        off = _off(counted, stated)
        if not off <= NEAR:
            raise Refused(
                f"a row of {length} tokens does {counted:,.0f} operations a token, and the formulas say {stated:,};"
                " correct flops_per_token, or halved_flops_per_token"
            )
        worst = max(worst, off)
    return Measured(worst, "relative error of the formula for FLOPs")


def state(candidate: Candidate) -> Measured:
    """`state_bytes` is the size of the state's tensors in bf16."""
    mix, length = candidate.mixer(), 40
    held, stated = _state(mix, noise(1, length, WIDTH)), mix.state_bytes(length)
    off = _off(held, stated)
    if not off <= NEAR:
        raise Refused(
            f"the state after {length} tokens holds {held:,} bytes in bf16, and state_bytes says {stated:,};"
            " correct the formula"
        )
    return Measured(off, "relative error of the formula for the state")


def growth(candidate: Candidate) -> Measured:
    """With the length of a row, operations, state and what training keeps grow by the powers that are stated."""
    bills = [_bill(candidate, length) for length in LENGTHS]
    pairs = {what: [bill[what] for bill in bills] for what in bills[0]}
    if candidate.says("causal"):
        pairs["the state"] = [_states(candidate, length) for length in STATE_LENGTHS]
    worst, found = 0.0, []
    for what, ((counted, stated), (counted_twice, stated_twice)) in pairs.items():
        power, wanted = _power(counted, counted_twice), _power(stated, stated_twice)
        if not abs(power - wanted) <= SLOPE:
            raise Refused(
                f"with the length of a row the growth of {what} is T^{power:.2f}, and T^{wanted:.2f} is stated;"
                f" correct {_STATED_BY[what]}"
            )
        worst = max(worst, abs(power - wanted))
        found.append(f"{what} T^{power:.2f}")
    return Measured(worst, f"from the stated powers: {', '.join(found)}")


def time_power(candidate: Candidate) -> str:
    """How the time of a forward and backward pass grows here, of which nothing is promised."""
    took = []
    for length in TIMED:
        mix, layout = candidate.built(), Layout.single(1, length)
        for parameter in mix.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x, passes = torch.randn(1, length, WIDTH), []
        for _ in range(3):
            began = time.perf_counter()
            mix(x, layout)[0].sum().backward()
            passes.append(time.perf_counter() - began)
        took.append(min(passes))
    power = math.log(took[1] / took[0]) / math.log(TIMED[1] / TIMED[0])
    return f"T^{power:.2f} from {TIMED[0]:,} to {TIMED[1]:,} tokens, forward and backward on this CPU"


def _bill(candidate: Candidate, length: int) -> dict[str, tuple[float, float]]:
    """What training on rows of `length` costs, counted and stated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        mix, layout = candidate.built(), Layout.single(_MANY_ROWS, length)
        x = torch.empty(_MANY_ROWS, length, WIDTH, requires_grad=True)
        counted, saved = _flops(mix, x), Saved(mix.parameters())
        with saved.counting():
            mix(x, layout)
    stated = _MANY_ROWS * length * (mix.flops_per_token(length) + mix.halved_flops_per_token(length))
    return {
        "operations": (counted, stated),
        "what training keeps": (sum(saved.bytes.values()), length ** (2 if mix.dense else 1)),
    }


@torch.no_grad()
def _states(candidate: Candidate, length: int) -> tuple[float, float]:
    """The size of the state after `length` tokens, counted and stated; real tensors, since a stream may be a loop."""
    mix = candidate.mixer()
    return _state(mix, noise(1, length, WIDTH)), mix.state_bytes(length)


def _flops(mix: TokenMixer, x: Tensor) -> int:
    """Operations of a forward pass of rows with documents, matrix products written out."""
    rows, length, _ = x.shape
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        mix(x, general(Layout.single(rows, length)))
    return counter.get_total_flops()


def _state(mix: TokenMixer, x: Tensor) -> int:
    """Bytes of the state after a row, were it in bf16; whole numbers are not counted."""
    _, after = mix(x, general(Layout.single(1, x.shape[1])), mix.initial_state(1, x))
    return 2 * sum(t.numel() for t in tree_leaves(after) if isinstance(t, Tensor) and t.is_floating_point())


def _off(counted: float, stated: float) -> float:
    return abs(counted - stated) / stated if stated else float(counted != 0)


def _power(low: float, high: float) -> float:
    """The exponent of a cost that is `low`, and `high` at twice the length."""
    if low <= 0:
        return 0.0 if high <= 0 else math.inf
    return math.log2(high / low) if high > 0 else -math.inf
