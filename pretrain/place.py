"""Where in its data a run is, from what a checkpoint says of it: for the run itself, a branch, and who asks later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Place:
    """Where a run goes on. rows: consumed so far. weights: (from row, weight of each source), ascending. skips: windows
    of rows passed over, as (before which row, how many)."""

    step: int
    rows: int
    weights: list[tuple[int, dict[str, float]]]
    skips: list[tuple[int, int]]


def beginning(step: int, weights: Weights) -> Place:
    """Before the first row of all, after `step` steps on whatever else."""
    return Place(step, 0, [(0, dict(weights))], [])


def sources_of(facts: Mapping[str, Any]) -> set[str]:
    """The sources that a checkpoint was trained on."""
    return set(facts["data"]["weights"][0][1])


def reads_on(facts: Mapping[str, Any], fingerprint: str, weights: Weights) -> bool:
    """Whether who goes on from a checkpoint has its data: the same shards, and of them the same sources. Otherwise all
    is read from its beginning."""
    return facts["data"]["fingerprint"] == fingerprint and sources_of(facts) == set(weights)


def place_of(facts: Mapping[str, Any], weights: Weights) -> Place:
    """The place of a checkpoint, from where sources are mixed by `weights`."""
    data = facts["data"]
    mixed = [(int(row), dict(mixture)) for row, mixture in data["weights"]]
    if mixed[-1][1] != weights:
        mixed.append((data["rows"], dict(weights)))
    return Place(facts["step"], data["rows"], mixed, [(int(at), int(count)) for at, count in data["skips"]])
