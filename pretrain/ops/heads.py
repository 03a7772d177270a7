"""Heads and the cache of keys and values: what every mixer with queries and keys shares.

Shapes: B rows, H query heads, Hkv key and value heads, T tokens of a piece, S keys so far, E head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import ConfigError
from pretrain.layout import Layout
from pretrain.mixer import Site


class Cache(NamedTuple):
    """What was seen: rotated keys and values (B, Hkv, S, E), and where each key lies (B, S)."""

    k: Tensor
    v: Tensor
    doc_BS: Tensor
    pos_BS: Tensor


def head_width(site: Site, heads: int, kv_heads: int) -> int:
    """Width of a head; raises ConfigError where heads do not divide the width, or each other."""
    if site.width % heads:
        fits = [h for h in range(1, site.width + 1) if site.width % h == 0]
        near = min(fits, key=lambda h: abs(h - heads))
        raise ConfigError(
            f"model.width {site.width} is not a multiple of {heads} heads; the nearest that fits is {near}"
        )
    if heads % kv_heads:
        raise ConfigError(f"{heads} heads are not a multiple of {kv_heads} kv_heads; choose a divisor")
    if site.positions == "rope" and site.width // heads % 2:
        raise ConfigError(
            f"heads of width {site.width // heads} cannot be rotated; make it even, or model.positions none"
        )
    return site.width // heads


def split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, E) and k, v (B, Hkv, T, E) out of one projection (B, T, (H + 2 Hkv) E)."""
    per_head = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = per_head.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def empty_cache(rows: int, kv_heads: int, width: int, like: Tensor) -> Cache:
    """The cache before the first token."""
    none = like.new_empty(rows, kv_heads, 0, width)
    places = torch.empty(rows, 0, dtype=torch.long, device=like.device)
    return Cache(none, none, places, places)


def extend(cache: Cache, k: Tensor, v: Tensor, layout: Layout) -> Cache:
    """The cache with the keys and values of a piece behind it."""
    return Cache(
        torch.cat((cache.k, k), dim=2),
        torch.cat((cache.v, v), dim=2),
        torch.cat((cache.doc_BS, layout.doc_BT), dim=1),
        torch.cat((cache.pos_BS, layout.pos_BT), dim=1),
    )


def visible(layout: Layout, cache: Cache) -> Tensor:
    """(B, 1, T, S) bool: the keys of the same document that are not later than the query."""
    same = layout.doc_BT[:, :, None] == cache.doc_BS[:, None, :]
    past = layout.pos_BT[:, :, None] >= cache.pos_BS[:, None, :]
    return (same & past)[:, None]
