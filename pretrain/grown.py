"""A frozen backbone that was trained without the part that is trained now: the state that a branch of it begins with.

What the checkpoint holds is read from it; the new part has its declared first values and no moments.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pretrain.checkpoint_files import CheckpointFiles
from pretrain.engine import PARAM
from pretrain.init import first_values


class Grown:
    """Reads a checkpoint and, where it lacks them, parameters of a model that may be without memory."""

    def __init__(self, files: CheckpointFiles, model: nn.Module, seed: int, new: Collection[str]) -> None:
        # all that is trained is new, and its moments have seen no gradient: their correction begins with them
        self.updates, self._files = 0, files
        self._first = {name: value.flatten() for name, value in first_values(model, seed, new).items()}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """As a `FragmentReader`."""
        if name not in self._first:
            return self._files.read(name, kind, start, stop)
        return self._first[name][start:stop] if kind == PARAM else torch.zeros(stop - start)


def new_part(model: nn.Module, known: Collection[str]) -> list[str]:
    """The parameters that a model trains, if they are exactly those it has beyond `known` ones; else none."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return trained if set(trained) == model.state_dict().keys() - set(known) else []
