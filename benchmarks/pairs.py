"""tinyshakespeare, bytes: stacks with edges between tokens, or several streams, against attention. Loss and CPU time.

The recipe is that of the benchmark `shakespeare`, but for 2 layers and rows of 64 tokens, as edges are 64 x 64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import Table
from benchmarks.shakespeare import compare, model_of
from pretrain.config import PartConfig

LENGTH, DEPTH = 64, 2
STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("blocks", {}),
    "quartic, edges that do not attend": ("quartic", {"edge_mixers": []}),
    "quartic, row and col": ("quartic", {"edge_mixers": ["row", "col"]}),
    "quartic, prefix": ("quartic", {"edge_mixers": ["prefix"]}),
    "relational": ("relational", {}),
    "multistream": ("multistream", {}),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)


def run(options: argparse.Namespace) -> Table:
    """Train every stack with every seed and return the table."""
    base = model_of("attention").model_copy(update={"depth": DEPTH, "length": LENGTH})
    arms = {
        name: base.model_copy(update={"stack": PartConfig(name=stack, options=keys)})
        for name, (stack, keys) in STACKS.items()
    }
    return compare(f"{DEPTH} layers, rows of {LENGTH}", arms, options)
