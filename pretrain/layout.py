"""Where documents lie in a batch: given to every mixer, so that packing is nobody's private guess.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pretrain.ops.rotary import Rotary


@dataclass(frozen=True)
class Layout:
    """Where documents lie in a packed batch.

    doc_BT: number of the document each token belongs to, rising by one at each boundary.
    pos_BT: tokens since the document began (in this row, or in this stream).
    ramps: every row is a single document from position 0 on, so that plain causal forms are enough.
    """

    doc_BT: Tensor
    pos_BT: Tensor
    ramps: bool
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def single(cls, rows: int, length: int, device: torch.device | str | None = None) -> Layout:
        """One document a row."""
        pos_BT = torch.arange(length, device=device).expand(rows, length)
        return cls(torch.zeros_like(pos_BT), pos_BT, True)

    def rotary(self, width: int, base: float, dtype: torch.dtype) -> Rotary:
        """Rotary angles of every token for heads of `width`; computed once a batch and shared by all layers."""
        key = ("rotary", width, base, dtype)
        if key not in self._cache:
            pos = self.pos_BT[:1] if self.ramps else self.pos_BT
            self._cache[key] = Rotary.of(pos, width, base, dtype)
        return self._cache[key]

    def mask(self) -> Tensor:
        """(B, 1, T, T) bool: which keys each query may see. Same document, not later."""
        if "mask" not in self._cache:
            length = self.doc_BT.shape[1]
            past_TT = torch.ones(length, length, dtype=torch.bool, device=self.doc_BT.device).tril()
            same_BTT = self.doc_BT[:, :, None] == self.doc_BT[:, None, :]
            self._cache["mask"] = (past_TT & same_BTT)[:, None]
        return self._cache["mask"]

    def mask_bias(self, dtype: torch.dtype) -> Tensor:
        """(1 or B, 1, T, T): 0 where a query may see a key, -inf elsewhere."""
        key = ("bias", dtype)
        if key not in self._cache:
            mask = self.mask()[:1] if self.ramps else self.mask()
            self._cache[key] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        return self._cache[key]

    def reaches(self, lag: int) -> Tensor:
        """(B, 1, T, 1) bool: whether the token `lag` earlier belongs to the same document."""
        key = ("reaches", lag)
        if key not in self._cache:
            self._cache[key] = (self.pos_BT >= lag)[:, None, :, None]
        return self._cache[key]

    def reaches_each(self, lags: int) -> Tensor:
        """(B, 1, L, T, 1): `reaches` of 0, 1, ... `lags` - 1."""
        key = ("reaches each", lags)
        if key not in self._cache:
            self._cache[key] = torch.stack([self.reaches(lag) for lag in range(lags)], dim=2)
        return self._cache[key]
