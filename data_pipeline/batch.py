"""What a model receives: tokens, what comes next, and where documents lie.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""The target of a token whose next token is not counted."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    tokens_BT, targets_BT: ids; a target is IGNORE where the next token belongs to another document.
    doc_BT: number of the document within its row, from 0. pos_BT: tokens since the document began in this row.
    source_B: index of the source each row is from. count: targets that are counted (known without asking the device).
    packed: whether any row holds more than one document.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    doc_BT: Tensor
    pos_BT: Tensor
    source_B: Tensor
    count: int
    packed: bool

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, without waiting for the copy."""
        if self.tokens_BT.device == device:
            return self
        names = ("tokens_BT", "targets_BT", "doc_BT", "pos_BT", "source_B")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(tokens_BS: np.ndarray, boundaries: list[np.ndarray], source_B: np.ndarray, *, pin: bool = False) -> Batch:
    """Rows of T + 1 tokens, and for each the places at which a new document begins, as a batch.

    tokens_BS: (B, T + 1) int64. boundaries: per row, ascending places in (0, T + 1). source_B: (B,) int64.
    """
    rows, length = tokens_BS.shape[0], tokens_BS.shape[1] - 1
    ramp = np.arange(length)
    targets = tokens_BS[:, 1:].copy()
    pos = np.broadcast_to(ramp, (rows, length)).copy()
    doc = np.zeros((rows, length), dtype=np.int64)
    uncounted, packed = 0, False
    for row, places in enumerate(boundaries):
        for place in places.tolist():
            targets[row, place - 1] = IGNORE
            uncounted += 1
            if place < length:
                pos[row, place:] = ramp[: length - place]
                doc[row, place:] += 1
                packed = True
    tensors = [torch.from_numpy(part) for part in (tokens_BS[:, :-1], targets, doc, pos, source_B)]
    if pin:
        tensors = [tensor.contiguous().pin_memory() for tensor in tensors]
    tokens_BT, targets_BT, doc_BT, pos_BT, source = tensors
    return Batch(tokens_BT, targets_BT, doc_BT, pos_BT, source, rows * length - uncounted, packed)
