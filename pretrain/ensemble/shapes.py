"""Modules of one shape run as one: which of an ensemble's those are, and the order of all.

Shapes: M modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.config import ModelConfig, shape_of


def groups_of(model: ModelConfig) -> list[ModelConfig]:
    """The ensemble of the modules of each shape, whose own that is; in the order in which shapes first appear."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name in model.ensemble.modules:
        by_shape.setdefault(shape_of(model, name), []).append(name)
    return [
        model.model_copy(
            update={
                "width": width,
                "depth": depth,
                "ensemble": model.ensemble.model_copy(update={"modules": tuple(names), "shapes": {}}),
            }
        )
        for (width, depth), names in by_shape.items()
    ]


class Order:
    """Where the modules of each group stand among all. groups: the places of each group's."""

    def __init__(self, model: ModelConfig) -> None:
        modules = list(model.ensemble.modules)
        self.groups = [[modules.index(name) for name in group.ensemble.modules] for group in groups_of(model)]
        in_turn = [place for places in self.groups for place in places]
        self._found = [in_turn.index(place) for place in range(len(modules))]

    def of_all(self, parts: Sequence[Tensor]) -> Tensor:
        """(M, ...): what each group has for its modules, put in the order of all."""
        if len(parts) == 1:
            return parts[0]
        in_turn = [own for part in parts for own in part.unbind()]
        return torch.stack([in_turn[place] for place in self._found])
