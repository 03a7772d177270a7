"""What a mixer is tried with: small sizes, random values, packed rows, and the mixer alone and in a small model.

Everything is a function of seeds and in float64, where two forms of one equation agree to rounding.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from configs.errors import LeviathanError
from pretrain import mixer
from pretrain.config import ModelConfig, PartConfig
from pretrain.init import initialise, materialise
from pretrain.layout import Layout
from pretrain.mixer import Positions, Site, TokenMixer
from pretrain.model import Model
from pretrain.models.build import build

M = TypeVar("M", bound=nn.Module)

ROWS, LENGTH, WIDTH, VOCAB, DEPTH = 3, 48, 32, 61, 2


class Refused(LeviathanError):  # noqa: N818 (it is the verdict's word)
    """A promise that is not kept: what was found, where, and what to do."""


class Measured(NamedTuple):
    """What was found where a promise is kept: a number, and what it is the number of."""

    number: float
    what: str


@dataclass(frozen=True)
class Candidate:
    """A mixer that asks for its certificate: one that comes along, or a file of the user's own."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None

    def built(self, positions: Positions = "rope") -> TokenMixer:
        """The mixer on torch's default device, its parameters not yet filled."""
        return mixer.make(self.name, self.options, Site(WIDTH, LENGTH, 0, DEPTH, positions=positions), self.file)

    def mixer(self, seed: int = 0) -> TokenMixer:
        """The mixer in float64 with random parameters, none of them zero."""
        return shaken(self.built(), seed)

    def shapes(self, positions: Positions = "rope") -> Model:
        """A model of two blocks of this mixer, without memory."""
        part = PartConfig(name=self.name, options=dict(self.options), file=self.file)
        config = ModelConfig(width=WIDTH, depth=DEPTH, length=LENGTH, mixers=(part,), positions=positions)
        return build(config, VOCAB)

    def model(self, positions: Positions = "rope") -> Model:
        """A model of two blocks of this mixer in float64 with random parameters, none of them zero."""
        return shaken(materialise(self.shapes(positions), "cpu"))

    def says(self, flag: str) -> bool:
        """Whether the mixer, with its options, has set this flag."""
        with torch.device("meta"):
            return bool(getattr(self.built(), flag))


def shaken(module: M, seed: int = 0) -> M:
    """The module in float64, its parameters as declared plus noise."""
    initialise(module, seed)
    module.double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return module


def noise(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal float64 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed: int = 3, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """(B, T) random ids."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(rows: int = ROWS, length: int = LENGTH, cuts: tuple[int, ...] = (1, 2, 17, 18, 40)) -> Layout:
    """Rows that hold several documents, some of one token; every other row is cut elsewhere."""
    pos, doc = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        begins = [0, *(c + 3 * (row % 2) for c in cuts if c + 3 * (row % 2) < length), length]
        for number, (start, stop) in enumerate(pairwise(begins)):
            pos[row, start:stop] = torch.arange(stop - start)
            doc[row, start:stop] = number
    return Layout(doc, pos, False)


def general(layout: Layout) -> Layout:
    """The same places, without the word that plain causal forms are enough."""
    return Layout(layout.doc_BT, layout.pos_BT, False)


def piece(layout: Layout, start: int, stop: int) -> Layout:
    """Some columns of a layout."""
    return Layout(layout.doc_BT[:, start:stop], layout.pos_BT[:, start:stop], False)
