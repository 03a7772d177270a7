"""Where in its data a run is, from what a checkpoint says of it: for the run itself, a branch, and who asks later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from pretrain.config import RunConfig, tokens_per_step

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Place:
    """Where a run goes on. rows: consumed so far. weights: (from row, weight of each source), ascending. skips: windows
    of rows passed over, as (before which row, how many). tokens: trained on so far, where that was noted."""

    step: int
    rows: int
    weights: list[tuple[int, dict[str, float]]]
    skips: list[tuple[int, int]]
    tokens: int | None = None


def beginning(step: int, weights: Weights, tokens: int | None = None) -> Place:
    """Before the first row of all, after `step` steps and `tokens` tokens of whatever else."""
    return Place(step, 0, [(0, dict(weights))], [], tokens)


def numbering(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What, beside weights, decides which row a number stands for. fingerprint: of the shards."""
    return {
        "fingerprint": fingerprint,
        "seed": config.run.seed,
        "length": config.model.length,
        "window": config.data.window,
    }


def sources_of(facts: Mapping[str, Any]) -> set[str]:
    """The sources that a checkpoint was trained on."""
    return set(facts["data"]["weights"][0][1])


def reads_on(facts: Mapping[str, Any], own: Mapping[str, Any], weights: Weights) -> bool:
    """Whether a row's number stands for the same to who goes on from a checkpoint: the same `numbering`, of the same
    sources. Otherwise all is read from its beginning."""
    theirs = facts["data"]
    return all(theirs.get(name, value) == value for name, value in own.items()) and sources_of(facts) == set(weights)


def place_of(facts: Mapping[str, Any], weights: Weights) -> Place:
    """The place of a checkpoint, from where sources are mixed by `weights`."""
    data = facts["data"]
    mixed = [(int(row), dict(mixture)) for row, mixture in data["weights"]]
    if mixed[-1][1] != weights:
        mixed.append((data["rows"], dict(weights)))
    skips = [(int(at), int(count)) for at, count in data["skips"]]
    return Place(facts["step"], data["rows"], mixed, skips, data.get("tokens"))


def tokens_before(config: RunConfig, place: Place) -> int:
    """Tokens trained on before a place. Raises ConfigError where `train.tokens` does not say how many steps follow."""
    alike = place.step * tokens_per_step(config)
    if place.tokens is None or place.tokens == alike:
        return alike
    if config.train.tokens is not None:
        raise ConfigError(
            f"train.tokens is counted in steps of {tokens_per_step(config):,} tokens, but the {place.step:,} before had"
            f" {place.tokens:,}; set train.tokens=null and train.steps"
        )
    return place.tokens
