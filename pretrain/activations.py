"""Memory that a forward pass keeps for its backward pass, counted without spending any.

The model runs on fake tensors, which have shapes and types but no memory, while autograd says what it saves. On a CPU
the count is what a real pass saves; on a GPU other kernels are chosen, and it is an estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.batch import Batch
from pretrain.config import ModelConfig
from pretrain.model import Model
from pretrain.models.build import make_model

_OUTSIDE = -1
"""The number of what is saved in no block: embedding, last norm, loss."""


def activation_bytes(config: ModelConfig, vocab: int, rows: int, *, bf16: bool, recompute: bool) -> int:
    """Bytes saved by one micro-batch of `rows` packed rows. recompute: blocks are run again in the backward pass."""
    with FakeTensorMode(), _default_dtype(torch.bfloat16 if bf16 else torch.float32):
        model = make_model(config, vocab).train()
        saved = _saved_by_block(model, _batch(rows, config.length))
    blocks = [saved.get(number, 0) for number in range(len(model.segments()))]
    if not recompute:
        return saved.get(_OUTSIDE, 0) + sum(blocks)
    # of each block its input stays, and of the one that is run again everything
    inputs = len(blocks) * rows * config.length * config.width * (2 if bf16 else 4)
    return saved.get(_OUTSIDE, 0) + inputs + max(blocks)


def _saved_by_block(model: Model, batch: Batch) -> dict[int, int]:
    """Bytes that autograd saves in each block."""
    saved = Saved(model.parameters())
    for number, block in enumerate(model.segments()):
        block.register_forward_pre_hook(lambda *_, number=number: saved.enter(number))
        block.register_forward_hook(lambda *_: saved.enter(_OUTSIDE))
    with saved.counting():
        model(batch)
    return saved.bytes


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
