"""tinyshakespeare, bytes: a mixture of experts against the dense network with as many parameters for a token.

The recipe is that of the benchmark `shakespeare`, but for the channel mixer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import Table
from benchmarks.shakespeare import compare, model_of
from pretrain.config import PartConfig

ARMS: dict[str, dict[str, Any]] = {
    "balanced by a loss": {},
    "balanced by biases": {"balance": "bias"},
    "means of 4 tokens decide": {"corr_router": 4},
    "1 of 4, and 1 more for all": {"experts": 4, "top_k": 1, "shared": 1},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mixer", default="correlation")


def run(options: argparse.Namespace) -> Table:
    """Train every arm with every seed and return the table."""
    dense = model_of(options.mixer)
    mixtures = {
        name: dense.model_copy(update={"channel": PartConfig(name="moe", options=given)})
        for name, given in ARMS.items()
    }
    return compare(f"experts beside {options.mixer}", {"dense": dense, **mixtures}, options)
