"""The training step: our loop against a bare one over the same module, and against the speed of the matrix products.

Our arm is the real train() with loader, schedule, heartbeat, votes and metrics.jsonl; every block of it is followed by
a block of the bare arm, in the same process, and CPU time is compared block by block.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import Interval, Table, cpu_seconds, interval
from benchmarks.shapes import SIZES, VOCAB, Shape, model_config
from data_pipeline import manifest as manifests
from data_pipeline.batch import Batch
from data_pipeline.loader import Loader, ShardSet
from data_pipeline.manifest import TokenizerInfo
from data_pipeline.order import Order
from data_pipeline.shards import ShardWriter
from pretrain import metrics, optim
from pretrain.checkpoint import CheckpointStore
from pretrain.config import CheckpointConfig, EngineConfig, OptimConfig
from pretrain.cost import cost_of, peak_flops
from pretrain.engine import TorchEngine
from pretrain.health import Heartbeat, StopRequests
from pretrain.init import initialise
from pretrain.log import Log
from pretrain.model import Model
from pretrain.models.build import build
from pretrain.parallel import Ranks, finish
from pretrain.run_folder import RunFolder
from pretrain.trainer import Plan, train


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--size", choices=SIZES, default=None, help="default: tiny; with --device cuda: 154m and 1b")
    parser.add_argument("--mixer", choices=["attention", "correlation"], default="attention")
    parser.add_argument("--blocks", type=int, default=None, help="paired blocks (default 60; 12 for 10m)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=None, help="as a run trains there; default: paired arms on the CPU"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps measured with --device")
    parser.add_argument("--compile", action="store_true", help="with --device: also under torch.compile")
    parser.add_argument("--against", choices=["transformers"], help="also a peer's model of the same shape")


def run(options: argparse.Namespace) -> Table:
    """Measure and return the table."""
    torch.set_num_threads(1)
    if options.device is not None:
        from benchmarks.step_device import run_device

        return run_device(options)
    options.size = options.size or "tiny"
    table = Table(f"training step, {options.size}, {options.mixer}, fp32, one thread, CPU time of the whole process")
    with tempfile.TemporaryDirectory() as folder:
        if options.size == "tiny":
            _overheads(table, options, Path(folder))
        else:
            _large(table, options, Path(folder))
    if options.against == "transformers":
        from benchmarks.peers import transformers_step

        transformers_step(table, options.size)
    finish()
    return table


def _overheads(table: Table, options: argparse.Namespace, folder: Path) -> None:
    """Fixed cost per step, in milliseconds, where a step is so small that it shows."""
    blocks, steps = options.blocks or 60, 60
    pairs = _in_turn("torch", options, folder / "t", blocks, steps)
    _report(table, "our loop, torch engine, over a bare torch loop", pairs, steps, goal=0.5)
    for stage in (0, 1, 2):
        pairs = _in_turn(f"zero{stage}", options, folder / f"z{stage}", blocks, 40)
        _report(table, f"our loop, DeepSpeed ZeRO-{stage}, over DeepSpeed's own loop", pairs, 40, goal=0.5)


def _large(table: Table, options: argparse.Namespace, folder: Path) -> None:
    blocks, steps = options.blocks or 12, 2
    shape, model = SIZES[options.size], _model(options)
    tokens = shape.rows * shape.length
    products, operations = _products(shape, tokens)
    turns = _in_turn("torch", options, folder, blocks, steps, products)
    ours, bare = ([turn[i] / steps for turn in turns] for i in (0, 1))
    limits = [operations / turn[2] for turn in turns]
    ratio = interval([b / o for o, b in zip(ours, bare)])
    table.add("bare loop, CPU s a step", interval(bare).median, "s", spread=interval(bare))
    table.add("our loop, CPU s a step", interval(ours).median, "s", spread=interval(ours))
    table.add("speed of our loop, bare loop = 1", ratio.median, "x", goal=0.99, sense=">=", spread=ratio)
    causal = cost_of(model).flops_per_token
    blocks_of: list[Any] = list(model.segments())
    halved = 3 * sum(block.mixer.halved_flops_per_token(shape.length) for block in blocks_of)
    rate = interval([causal * tokens / s for s in ours])
    limit = interval(limits)
    share = interval([causal * tokens / s / most for s, most in zip(ours, limits)])
    table.add("torch.mm at the model's shapes", limit.median / 1e9, "GFLOP per CPU s", spread=_scaled(limit, 1e-9))
    table.add(
        "our loop, scores counted half (causal)", rate.median / 1e9, "GFLOP per CPU s", spread=_scaled(rate, 1e-9)
    )
    # the goal is a GPT's; a correlation of L lags spends L times as much on scores, which no matrix product limits
    goal = 0.85 if (options.size, options.mixer) == ("10m", "attention") else None
    table.add("share of the torch.mm rate", share.median, "", goal=goal, sense=">=", spread=share)
    table.add("the same, whole score matrices counted", share.median * (causal + halved) / causal, "")
    table.add("tokens per CPU s", tokens / interval(ours).median, "")


def _scaled(spread: Interval, factor: float) -> Interval:
    return Interval(spread.median * factor, spread.low * factor, spread.high * factor, spread.count)


def _report(table: Table, name: str, pairs: list[tuple[float, ...]], steps: int, goal: float) -> None:
    over = interval([1e3 * (ours - bare) / steps for ours, bare in pairs])
    bare = interval([1e3 * b / steps for _, b in pairs])
    table.add(name, over.median, "ms a step", goal=goal, spread=over, note=f"(bare: {bare.median:.2f} ms)")


def _model(options: argparse.Namespace) -> Model:
    model = build(model_config(options.size, options.mixer), VOCAB).to_empty(device="cpu")
    initialise(model, 0)
    return model


def _in_turn(
    kind: str, options: argparse.Namespace, folder: Path, blocks: int, steps: int, *others: Callable[[], Any]
) -> list[tuple[float, ...]]:
    """CPU seconds of (our block, bare block, others), again and again. All but ours run inside our loop's heartbeat."""
    shape = SIZES[options.size]
    loader = _loader(folder / "shards", shape.length, shape.rows)
    bare = _bare(kind, options, [b for step in loader.steps(0, 32) for b in step])
    watch = _Blocks(steps, [lambda: [bare(i) for i in range(steps)], *others])
    run_folder = RunFolder(folder / "run")
    run_folder.make()
    ranks = Ranks(0, 1, 0, "here")
    engine = _engine(kind, options, shape.rows)
    cost = cost_of(engine.model)
    log = Log(
        run_folder,
        metrics.Meter(0, ["text"], shape.rows * shape.length, cost.flops_per_token,
                      peak_flops_per_s=peak_flops(torch.device("cpu"), "fp32")),
        None,
    )  # fmt: skip
    total = steps * (blocks + 2)
    schedule = optim.lr_scale(OptimConfig(), total)
    store = CheckpointStore(run_folder, ranks, CheckpointConfig())
    loader.seek(0)
    train(
        engine, loader, store, log, Plan(0, total, 10**9, 0, 3, 1e-3), lr_scale=schedule, evaluate=lambda step: {},
        facts=dict, requests=StopRequests(run_folder.stop_request), heartbeat=watch,
    )  # fmt: skip
    loader.close()
    log.close()
    return watch.turns[1:]


class _Blocks(Heartbeat):
    """A heartbeat as in a real run that, between two blocks of steps, lets the other arms have their turns."""

    def __init__(self, steps: int, others: Sequence[Callable[[], Any]]) -> None:
        super().__init__(Path(tempfile.mkdtemp()) / "beat")
        self._steps, self._others, self._at = steps, others, 0.0
        self.turns: list[tuple[float, ...]] = []

    def at(self, phase: str, step: int) -> None:
        """Beat, and at the first phase of a block measure all arms."""
        if phase == "data" and step % self._steps == 0:
            ours = time.process_time() - self._at
            theirs = [cpu_seconds(other) for other in self._others]
            if step:
                self.turns.append((ours, *theirs))
            self._at = time.process_time()
        super().at(phase, step)


def _engine(kind: str, options: argparse.Namespace, rows: int) -> Any:
    shared: dict[str, Any] = {"sources": 1, "seed": 0, "device": torch.device("cpu")}
    if kind == "torch":
        return TorchEngine(_model(options), OptimConfig(), EngineConfig(name="torch"), **shared)
    from pretrain.engine_deepspeed import DeepSpeedEngine

    config = EngineConfig.model_validate({"zero": int(kind[-1])})
    return DeepSpeedEngine(_model(options), OptimConfig(), config, **shared, batch_rows=rows, micro_rows=rows)


def _bare(kind: str, options: argparse.Namespace, batches: list[Batch]) -> Callable[[int], None]:
    """One step of the loop that anybody would write by hand over the same module, its batches ready."""
    model = _model(options)
    groups = optim.param_groups(model, OptimConfig())
    optimizer = torch.optim.AdamW([{k: v for k, v in g.items() if k != "names"} for g in groups], lr=1e-3, fused=True)
    parameters = list(model.parameters())
    if kind == "torch":

        def step(number: int) -> None:
            batch = batches[number % len(batches)]
            loss = model(batch).total / batch.count
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    from pretrain.engine_deepspeed import import_deepspeed, start_distributed

    start_distributed(torch.device("cpu"), 60)
    settings = {
        "train_micro_batch_size_per_gpu": batches[0].tokens_BT.shape[0],
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(kind[-1]), "reduce_bucket_size": 1 << 20, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    engine, *_ = import_deepspeed(torch.device("cpu")).initialize(model=model, optimizer=optimizer, config=settings)

    def deepspeed_step(number: int) -> None:
        batch = batches[number % len(batches)]
        loss = engine(batch).total / batch.count
        engine.backward(loss)
        engine.step()

    return deepspeed_step


def _loader(folder: Path, length: int, rows: int) -> Loader:
    """A loader over real shards of random text."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder / "text.tar", "text", "train", VOCAB)
    for i in range(400):
        writer.add(f"d{i}", rng.integers(0, VOCAB, 8000).astype(np.uint16), 8000)
    manifest = manifests.make(TokenizerInfo("bytes", "x", VOCAB), [writer.close()], {"text": {}})
    order = Order(manifest, length=length, seed=0, weights={"text": 1.0})
    shards = ShardSet(manifest, lambda info: folder / info.name)
    return Loader(order, shards, batch_rows=rows, micro_rows=rows, rank=0, world=1)


def _products(shape: Shape, tokens: int) -> tuple[Callable[[], None], int]:
    """The matrix products of a step's linear layers alone, forward and backward; and how many operations they are."""
    d, layers = shape.width, 2
    sizes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * layers
    layer = [(torch.randn(tokens, i), torch.randn(o, i), torch.randn(tokens, o)) for o, i in sizes]

    def products() -> None:
        for x, weight, grad in layer:
            F.linear(x, weight)
            grad @ weight
            grad.T @ x

    return products, sum(6 * tokens * o * i for o, i in sizes)
