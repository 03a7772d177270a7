"""The one run that was published of Leviathan: its shape of 5,315 parameters, causal, on tinyshakespeare.

4 wide, 2 heads, 2 blocks, rows of 512, 64 rows a batch, AdamW at a constant 3e-4, dropout 0.1 (where ours has it: on
the embedding and on what branches give). Published: validation loss 4.715 at first, 2.784 after 7,300 steps, by an
operator that saw the future and other rows, trained on the last tenth of a larger text. docs/PUBLISHED.md tells what
differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import Table
from benchmarks.shakespeare import Trial, opened, symbols_of
from configs.load import load
from pretrain.config import ModelConfig, OptimConfig, RunConfig

ROWS, STEPS, EVERY, EVALUATED = 64, 7300, 100, 100
PUBLISHED = {0: 4.7154, 1000: 3.2591, 2000: 3.0849, 5000: 2.8735, 7300: 2.7843}
PRESET = Path(__file__).parents[1] / "configs/models/leviathan-5k.yaml"
OPTIM = OptimConfig(lr=3e-4, betas=(0.9, 0.999), weight_decay=0.01, clip=0.0, schedule="constant", warmup_steps=0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--file", type=Path, default=Path("tinyshakespeare.txt"), help="1,115,394 characters of it")
    parser.add_argument("--minutes", type=float, default=30.0, help="the most CPU minutes that each run may take")
    parser.add_argument("--vocabulary", choices=["bytes", "symbols"], default="symbols")


def run(options: argparse.Namespace) -> Table:
    """Train until the steps or the minutes are over and return the curve."""
    torch.set_num_threads(1)
    table = Table(f"the published run's shape, {options.vocabulary}, causal: held-out nats a character")
    config = model()
    with opened(options.file) as dataset:
        symbols = symbols_of(dataset) if options.vocabulary == "symbols" else None
        trial = Trial(dataset, config, 0, STEPS, optim=OPTIM, rows=ROWS, symbols=symbols)
        end = time.process_time() + 60 * options.minutes
        while True:
            loss = trial.loss(EVALUATED)
            print(f"step {trial.done}: {loss:.4f}", file=sys.stderr, flush=True)
            over = trial.done >= STEPS or time.process_time() >= end
            if trial.done % 1000 == 0 or over:
                near = f"published {PUBLISHED[trial.done]}" if trial.done in PUBLISHED else ""
                table.add(f"step {trial.done:,}", loss, "nats", note=near)
            if over:
                break
            trial.advance(EVERY)
        trial.close()
        table.add("parameters", trial.parameters, "", note="published 5,315, with 91 symbols and 1,000 positions")
    return table


def model() -> ModelConfig:
    """The shape of the published run, with its dropout."""
    return load(RunConfig, [PRESET]).model.model_copy(update={"dropout": 0.1})
