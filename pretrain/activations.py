"""Memory that a forward pass keeps for its backward pass, counted without spending any.

The model runs on fake tensors, which have shapes and types but no memory, while autograd says what it saves. On a CPU
the count is what a real pass saves; on a GPU other kernels are chosen, and it is an estimate.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import Batch
from pretrain.config import ModelConfig
from pretrain.model import Model
from pretrain.models.build import make_model

_OUTSIDE = -1
"""The number of what is saved in no segment: embedding, last norm, loss."""


class _Call(NamedTuple):
    """Of one call of a segment: bytes of its inputs, bytes that it saves, and the segment's number."""

    inputs: int
    saved: int
    segment: int


def activation_bytes(config: ModelConfig, vocab: int, rows: int, *, bf16: bool, recompute: bool) -> int:
    """Bytes saved by one micro-batch of `rows` packed rows. recompute: segments are run again in the backward pass."""
    wrap = config.wrap
    # everything is saved, to be seen; what will be run again is taken off afterwards
    seen = config.model_copy(update={"wrap": wrap.model_copy(update={"checkpoint": False})})
    with FakeTensorMode(), _default_dtype(torch.bfloat16 if bf16 else torch.float32):
        model = make_model(seen, vocab).train()
        outside, calls = _saved_by_call(model, _batch(rows, config.length))
    again = wrap.checkpoint and wrap.passes > 1
    parts = _by_pass(calls, wrap.passes if again else 1)
    return outside + _kept([part[0]._replace(saved=_kept(part, recompute)) for part in parts], again)


def _by_pass(calls: Sequence[_Call], passes: int) -> list[list[_Call]]:
    """The calls of each pass; of models that run in groups, of each pass of a group."""
    total, seen = Counter(call.segment for call in calls), Counter[int]()

    def number(call: _Call) -> int:
        seen[call.segment] += 1
        return (seen[call.segment] - 1) * passes // total[call.segment]

    return [list(part) for _, part in groupby(calls, key=number)]


def _kept(calls: Sequence[_Call], again: bool) -> int:
    """Bytes kept of some calls: of those run again their inputs stay, and of one at a time everything."""
    if not again:
        return sum(call.saved for call in calls)
    return sum(call.inputs for call in calls) + max(call.saved for call in calls)


def _saved_by_call(model: Model, batch: Batch) -> tuple[int, list[_Call]]:
    """Bytes that autograd saves outside of all segments, and in each call of a segment; one may be called often."""
    saved, inputs, called = Saved(model.parameters()), list[int](), list[int]()

    def enter(segment: nn.Module, given: tuple[Any, ...]) -> None:
        saved.enter(len(inputs))
        inputs.append(sum(t.nbytes for t in tree_leaves(given) if torch.is_tensor(t) and t.is_floating_point()))
        called.append(id(segment))

    for segment in model.segments():
        segment.register_forward_pre_hook(enter)
        segment.register_forward_hook(lambda *_: saved.enter(_OUTSIDE))
    with saved.counting():
        model(batch)
    return saved.bytes[_OUTSIDE], [
        _Call(size, saved.bytes[number], segment) for number, (size, segment) in enumerate(zip(inputs, called))
    ]


class Saved:
    """Counts what autograd saves, place by place: every piece of memory once, parameters not at all."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes: dict[int, int] = defaultdict(int)
        """Of each place that was entered, and of none."""
        self._known = {p.untyped_storage()._cdata for p in parameters}
        self._kept: list[torch.UntypedStorage] = []
        self._place = _OUTSIDE

    def enter(self, place: int) -> None:
        """Count what is saved from now on as that of `place`."""
        self._place = place

    def counting(self) -> AbstractContextManager[None]:
        """While this is entered, everything saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(storage)  # so that no later storage gets the same address
            self.bytes[self._place] += storage.nbytes()
        return tensor


def _batch(rows: int, length: int) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return Batch(ids, ids, ids, ids, torch.zeros(rows, dtype=torch.long), rows * length, True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
