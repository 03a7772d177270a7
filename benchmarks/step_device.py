"""The training step on one device as a run would train there: tokens per second, MFU, memory. Wall time."""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.common import Interval, Table, interval
from benchmarks.shapes import SIZES, VOCAB, model_config
from data_pipeline.batch import Batch
from pretrain.config import EngineConfig, OptimConfig
from pretrain.cost import cost_of, peak_flops
from pretrain.engine_deepspeed import DeepSpeedEngine
from pretrain.init import initialise
from pretrain.models.build import build


def run_device(options: argparse.Namespace) -> Table:
    """Measure the size asked for; on a GPU, where none was, those of 154 million and of a billion parameters."""
    default = ["tiny"] if options.device == "cpu" else ["154m", "1b"]
    sizes = default if options.size is None else [options.size]
    table = Table(f"training step on {options.device}, {options.mixer}, bf16, DeepSpeed ZeRO-1, one device, wall time")
    for size in sizes:
        for compiled in (False, True) if options.compile else (False,):
            _measure(table, options, size, compiled)
    return table


def _measure(table: Table, options: argparse.Namespace, size: str, compiled: bool) -> None:
    device = torch.device(options.device)
    shape = SIZES[size]
    model = build(model_config(size, options.mixer), VOCAB)
    cost = cost_of(model)
    model.to_empty(device=device)
    initialise(model, 0)
    config = EngineConfig(precision="bf16", zero=1, device=options.device, compile=compiled)
    engine = DeepSpeedEngine(
        model, OptimConfig(lr=1e-4), config, sources=1, seed=0, device=device, batch_rows=shape.rows,
        micro_rows=shape.rows,
    )  # fmt: skip
    batch = _batch(shape.rows, shape.length)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(3):
        engine.step([batch], step, 1.0)
    seconds = []
    for step in range(3, 3 + options.steps):
        began = time.perf_counter()
        engine.step([batch], step, 1.0)  # ends with the loss on the host: nothing is left to wait for
        seconds.append(time.perf_counter() - began)
    tokens = shape.rows * shape.length
    rate = interval([tokens / s for s in seconds])
    peak = peak_flops(device, "bf16")
    name = f"{size}{' compiled' if compiled else ''}"
    table.add(f"{name}: parameters", cost.parameters / 1e6, "M")
    table.add(f"{name}: tokens per second", rate.median, "tok/s", spread=rate)
    factor = cost.flops_per_token / peak
    mfu = Interval(rate.median * factor, rate.low * factor, rate.high * factor, rate.count)
    table.add(f"{name}: MFU of {peak / 1e12:.1f} TFLOP/s", mfu.median, "", spread=mfu)
    if device.type == "cuda":
        table.add(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def _batch(rows: int, length: int) -> Batch:
    """Random tokens, one document a row."""
    tokens = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    pos = torch.arange(length).expand(rows, length).contiguous()
    return Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(pos), pos,
        torch.zeros(rows, dtype=torch.long), rows * length, False,
    )  # fmt: skip
