"""Clusters of documents: what a text is near to, computed from its token ids alone, one id after the other.

    e(x_<=t) = unit(sum over s <= t of table[bucket(x_{s-n+1}, ..., x_s)])       ids before the document are "none"
    a text belongs to the cluster whose centre is nearest to its e

The sum only grows, so every prefix of a document has its embedding for the price of one row of the table a token; the
ensemble weighs its modules by it (pretrain/ensemble/nearest.py). What is learned is in data_pipeline/clustering.py.

Source: c-BTM (arXiv 2303.14177) embeds by tf-idf and a singular value decomposition; n-grams of ids in hashed buckets,
which need no list of words, are this project's.

Shapes: H buckets, E width, K clusters, N ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, DataError
from data_pipeline.files import write_whole

BUCKETS, WIDTH = 1 << 14, 32
FORMAT = "leviathan clusters 1"
_PRIME, _STEP, _LAST = 2**31 - 1, 48271, 69621


@dataclass(frozen=True)
class Facts:
    """What clusters were made with: a tokenizer's sha256 and vocabulary, n ids in a gram, H, E, the clusters' names."""

    tokenizer: str
    vocab: int
    ids: int
    buckets: int
    width: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Clusters:
    """table_HE: what each bucket adds to an embedding. centres_KE: of each cluster. Both float32."""

    facts: Facts
    table_HE: np.ndarray
    centres_KE: np.ndarray


def bucket(gram: Sequence[Any], buckets: int) -> Any:
    """The bucket of each gram. gram: its ids, the oldest first, int64 arrays or tensors of one shape.

    Every product stays below 2^63, so numpy and torch agree on every device.
    """
    number = gram[0] * 0
    for ids in gram:
        number = (number * _STEP + ids + 1) % _PRIME
    return (number * _LAST) % _PRIME % buckets


def buckets_of(ids_N: np.ndarray, facts: Facts, before: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64: the bucket at every id of a document. before: the n - 1 ids before them, where there are any."""
    last = facts.ids - 1
    none = np.full(last, facts.vocab, dtype=np.int64)
    padded = np.concatenate((none if before is None else before, ids_N)).astype(np.int64)
    return bucket([padded[first : first + len(ids_N)] for first in range(facts.ids)], facts.buckets)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, those of length 0 as they are. (..., E)"""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def save(path: Path, clusters: Clusters) -> None:
    """Write a .safetensors file, whole or not at all, with its facts inside."""
    from safetensors.numpy import save as packed

    facts = json.dumps({"format": FORMAT, **asdict(clusters.facts)})
    tensors = {"table": clusters.table_HE, "centres": clusters.centres_KE}
    write_whole(path, packed(tensors, metadata={"facts": facts}))


def load(path: Path) -> Clusters:
    """What `save` wrote. Raises ConfigError where there is no such file, DataError for one that is something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(
            f"there is no file of clusters {path}; make it with `leviathan data cluster`, or mend"
            " model.ensemble.clusters.file"
        )
    try:
        with safe_open(path, framework="np") as file:
            content = json.loads((file.metadata() or {}).get("facts", "{}"))
            if content.pop("format", None) != FORMAT:
                raise DataError(f"{path} holds no clusters; give the clusters.safetensors of `leviathan data cluster`")
            facts = Facts(**{**content, "names": tuple(content["names"])})
            found = Clusters(facts, file.get_tensor("table"), file.get_tensor("centres"))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is damaged ({error}); copy it again, or make it with `leviathan data cluster`"
        ) from None
    shapes = (found.table_HE.shape, found.centres_KE.shape)
    if shapes != ((facts.buckets, facts.width), (len(facts.names), facts.width)):
        raise DataError(f"{path} is damaged (its tables have shapes {shapes}); make it with `leviathan data cluster`")
    return found


def check_names(modules: Sequence[str], clusters: Sequence[str], path: Path, *, every: bool = False) -> None:
    """Raise ConfigError where a module is no cluster; every: also where a cluster is no module."""
    lost = [name for name in modules if name not in clusters]
    unused = [name for name in clusters if every and name not in modules]
    if lost or unused:
        wrong = f"the module {lost[0]!r} is none of them" if lost else f"no module is called {unused[0]!r}"
        raise ConfigError(
            f"{path} has the clusters {', '.join(clusters)}, and {wrong}; modules must be called as clusters are,"
            " as in the clusters.yaml beside it"
        )
