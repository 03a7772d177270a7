"""The sizes that benchmarks speak of."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import ModelConfig, PartConfig

VOCAB = 257


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the rows of one batch."""

    width: int
    depth: int
    length: int
    heads: int
    rows: int


SIZES = {
    "tiny": Shape(64, 2, 32, 4, 2),
    "10m": Shape(384, 6, 256, 6, 8),
    "154m": Shape(800, 20, 1024, 20, 32),
    "1b": Shape(2048, 20, 2048, 16, 8),
}


def model_config(size: str, mixer: str) -> ModelConfig:
    """The model of a size with one mixer in every block."""
    shape = SIZES[size]
    part = PartConfig(name=mixer, options={"heads": shape.heads})
    return ModelConfig(width=shape.width, depth=shape.depth, length=shape.length, mixers=(part,))
