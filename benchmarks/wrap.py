"""tinyshakespeare, bytes: three passes of a stack against one, and against three times the layers. Loss and CPU time.

The recipe is that of the benchmark `shakespeare`, but for the depth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import Table
from benchmarks.shakespeare import compare, model_of
from pretrain.config import WrapConfig

PASSES, DEPTH = 3, 2
ARMS: dict[str, dict[str, Any]] = {
    "once": {"depth": DEPTH},
    "three passes": {"depth": DEPTH, "wrap": WrapConfig(passes=PASSES)},
    "three passes, all trained": {"depth": DEPTH, "wrap": WrapConfig(passes=PASSES, loss="mean_all")},
    "three times the layers": {"depth": PASSES * DEPTH},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mixer", default="correlation")


def run(options: argparse.Namespace) -> Table:
    """Train every arm with every seed and return the table."""
    arms = {name: model_of(options.mixer).model_copy(update=keys) for name, keys in ARMS.items()}
    return compare(f"{DEPTH} blocks of {options.mixer}", arms, options)
