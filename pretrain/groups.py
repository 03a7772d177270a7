"""Parts of a model that differ in shape alone: one for each group of members, under names that tell of no group.

Members are run as one where they have one shape. How they are grouped is a layout of the run only, as members are:
first values and checkpoints have the names that a model of one group would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class Groups(nn.ModuleList):
    """The same part, once for each group."""


def grouped(parts: Sequence[nn.Module]) -> Any:
    """A part for each group as one; of a single group the part itself."""
    return parts[0] if len(parts) == 1 else Groups(parts)


def parts_of(part: nn.Module) -> list[Any]:
    """What `grouped` was given."""
    return list(part) if isinstance(part, Groups) else [part]


def without_groups(model: nn.Module) -> Callable[[str], str]:
    """The name that a path in this model would have if there was one group."""
    places = [f"{path}." for path, part in model.named_modules() if isinstance(part, Groups)]

    def plain(path: str) -> str:
        for place in places:
            if path.startswith(place):
                inside = path.removeprefix(place).partition(".")[2]
                return f"{place}{inside}".removesuffix(".")
        return path

    return plain
