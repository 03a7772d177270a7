"""Edges: vectors of pairs of tokens beside those of tokens, and what mixes them."""
