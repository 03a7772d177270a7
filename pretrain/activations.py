"""Memory that a forward pass keeps for its backward pass, counted without spending any.

The model runs on fake tensors, which have shapes and types but no memory, while autograd says what it saves. On a CPU
the count is what a real pass saves; on a GPU other kernels are chosen, and it is an estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.batch import Batch
from pretrain.config import ModelConfig
from pretrain.models.language_model import LanguageModel

_OUTSIDE = -1
"""The number of what is saved in no block: embedding, last norm, loss."""


def activation_bytes(config: ModelConfig, vocab: int, rows: int, *, bf16: bool, recompute: bool) -> int:
    """Bytes saved by one micro-batch of `rows` packed rows. recompute: blocks are run again in the backward pass."""
    with FakeTensorMode(), _default_dtype(torch.bfloat16 if bf16 else torch.float32):
        model = LanguageModel(config, vocab).train()
        saved = _saved_by_block(model, _batch(rows, config.length))
    blocks = [saved.get(layer, 0) for layer in range(config.depth)]
    if not recompute:
        return saved.get(_OUTSIDE, 0) + sum(blocks)
    # of each block its input stays, and of the one that is run again everything
    inputs = config.depth * rows * config.length * config.width * (2 if bf16 else 4)
    return saved.get(_OUTSIDE, 0) + inputs + max(blocks)


def _saved_by_block(model: LanguageModel, batch: Batch) -> dict[int, int]:
    """Bytes that autograd saves in each block, every piece of memory counted once, parameters not at all."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[torch.UntypedStorage] = []
    saved: dict[int, int] = defaultdict(int)
    now = [_OUTSIDE]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(storage)  # so that no later storage gets the same address
            saved[now[0]] += storage.nbytes()
        return tensor

    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: now.__setitem__(0, layer))
        block.register_forward_hook(lambda *_: now.__setitem__(0, _OUTSIDE))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch)
    return saved


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
