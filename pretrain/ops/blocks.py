"""How a row is cut into blocks by the forms that are dense within a block and linear beyond it."""

from __future__ import annotations


def even_blocks(length: int, longest: int) -> tuple[int, int]:
    """How many blocks of at most `longest` tokens cover `length`, and of how many tokens: as equal as can be."""
    count = -(-length // longest)
    return count, -(-length // count)
