"""What the contract tests run over: every registered mixer, alone and in a small model, in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from pretrain import mixer
from pretrain.config import ModelConfig, PartConfig
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.mixer import Site, TokenMixer
from pretrain.models.language_model import LanguageModel, build

M = TypeVar("M", bound=nn.Module)

ROWS, LENGTH, WIDTH, VOCAB = 3, 48, 32, 61

# options beyond a mixer's defaults that are worth the whole contract; a mixer without an entry is run as it is
VARIANTS: dict[str, list[dict[str, object]]] = {
    "attention": [{}, {"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 1}],
    "correlation": [{}, {"lags": 1}, {"lags": 7, "lag_init": "uniform"}, {"lags": 3, "lag_init": "delta"}],
}
CASES = [(name, options) for name in mixer.REGISTRY.names() for options in VARIANTS.get(name, [{}])]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}" for name, options in CASES]


def make_mixer(name: str, options: dict[str, object], positions: str = "rope") -> TokenMixer:
    """A mixer in float64 with random parameters, none of them zero."""
    site = Site(WIDTH, LENGTH, 0, 2, positions=positions)  # type: ignore[arg-type]
    return shaken(mixer.make(name, options, site))


def make_model(name: str, options: dict[str, object], **model: object) -> LanguageModel:
    """A two-block model in float64 with random parameters, none of them zero."""
    parts = (PartConfig(name=name, options=options),)
    config = ModelConfig(width=WIDTH, depth=2, length=LENGTH, mixers=parts, **model)  # type: ignore[arg-type]
    return shaken(build(config, VOCAB).to_empty(device="cpu"))


def shaken(module: M) -> M:
    """The module in float64, its parameters as declared plus noise."""
    initialise(module, seed=0)
    module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def noise(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal float64 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed: int = 3, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Random ids."""
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


def piece(layout: Layout, start: int, stop: int) -> Layout:
    """Some columns of a layout."""
    return Layout(layout.doc_BT[:, start:stop], layout.pos_BT[:, start:stop], False)
