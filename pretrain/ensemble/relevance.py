"""What an evaluation says of an ensemble's modules, source by source."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.run_folder import Record


class Judged(NamedTuple):
    """Of one module on one source: mean relevance, from 0 to 1, and mean loss in nats."""

    relevance: float
    loss: float


def judged(record: Record) -> dict[str, dict[str, Judged]]:
    """By source, then by module; modules that were left out are left out. Empty where the model is no ensemble."""
    told, left_out = record.get("model", {}), record.get("without", [])
    return {
        source: {
            module: Judged(relevance, told[source]["loss"][module])
            for module, relevance in told[source]["relevance"].items()
            if module not in left_out
        }
        for source in record["sources"]
        if "relevance" in told.get(source, {})
    }
