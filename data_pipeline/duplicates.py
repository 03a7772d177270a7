"""Which documents were there before: exact duplicates, found by the hashes of their texts."""

from __future__ import annotations

import numpy as np


def repeated(hashes: list[np.ndarray]) -> list[np.ndarray]:
    """For each array (n, 2) of u64 hashes, the rows (int64) that stood before, in it or in an earlier one."""
    starts = np.cumsum([0, *map(len, hashes)])
    together = np.concatenate(hashes)
    order = np.lexsort((together[:, 0], together[:, 1]))  # stable, so the first of equals stays the first
    ordered = together[order]
    again = np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)])
    cuts = np.searchsorted(again, starts)
    return [again[a:b] - start for a, b, start in zip(cuts, cuts[1:], starts)]
