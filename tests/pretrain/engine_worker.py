"""What ranks do in the engine tests: tasks that `run_ranks` asks for.

One pair of processes runs a whole matrix, since starting them costs more than training.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import Batch, collate
from pretrain import faults
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint_files import CheckpointFiles, newest_readable, open_files
from pretrain.config import CheckpointConfig, EngineConfig, ModelConfig, OptimConfig, PartConfig
from pretrain.engine import Engine, TorchEngine
from pretrain.engine_deepspeed import DeepSpeedEngine
from pretrain.init import constant, declare, initialise, materialise
from pretrain.model import LossParts
from pretrain.models.build import build
from pretrain.models.language_model import LanguageModel
from pretrain.ops.expert_parallel import shard_experts
from pretrain.parallel import Ranks, sum_over_ranks
from pretrain.run_folder import RunFolder
from tests.ranks import work

RANKS = Ranks.from_environment()
CPU = torch.device("cpu")
VOCAB, LENGTH, ROWS = 67, 24, 8


class Counting(LanguageModel):
    """A model half frozen, which counts in a buffer what only updates may tell it."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__(config, vocab)
        self.register_buffer("counts", torch.empty(3, dtype=torch.long))
        declare(self, {"counts": constant(1 << 40)})
        self.blocks[0].requires_grad_(False)
        self.embed.requires_grad_(False)
        self.now = -1

    def begin_step(self, step: int) -> None:
        self.now = step

    def forward(self, batch: Batch) -> LossParts:
        told = [1.0, float(self.now), float(batch.targets_BT.numel())]
        return super().forward(batch)._replace(measures=torch.tensor(told))

    def settle(self, measures: Sequence[float]) -> None:
        # a number that neither fp32 nor the finite check of floats could take
        self.counts -= torch.tensor(measures).long()


def engine_of(
    stage: str, precision: str = "fp32", micro: int | None = None, model: ModelConfig | None = None,
    optim: OptimConfig | None = None, counting: bool = False, **more: object,
) -> Engine:  # fmt: skip
    """An engine over a small hybrid with odd sizes, biases and two parameter groups."""
    model = model or ModelConfig(
        width=20, depth=2, length=LENGTH, bias=True, norm="layernorm",
        mixers=tuple(PartConfig(name=name, options={"heads": 2}) for name in ("attention", "correlation")),
    )  # fmt: skip
    built = Counting(model, VOCAB) if counting else build(model, VOCAB)
    if "expert_parallel" in more:
        shard_experts(built, more["expert_parallel"], RANKS)
    initialise(materialise(built, "cpu"), 0)
    optim = optim or OptimConfig(lr=5e-3, clip=0.5)
    shared = {"sources": 2, "seed": 0, "device": CPU}
    if stage == "torch":
        config = EngineConfig(name="torch", precision=precision, **more)
        return TorchEngine(built, optim, config, **shared)
    config = EngineConfig(zero=int(stage), precision=precision, timeout_s=60, **more)
    micro = micro or ROWS // RANKS.world // 2
    return DeepSpeedEngine(built, optim, config, **shared, batch_rows=ROWS, micro_rows=micro)


def batches(step: int, micro: int | None = None) -> list[Batch]:
    """This rank's share of a global batch that is a function of the step."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1))
    # very unequal counts of targets, so that averaging over rows or ranks would show
    cuts = [np.arange(1, LENGTH) if r < 3 else np.sort(rng.choice(np.arange(1, LENGTH), 2, False)) for r in range(ROWS)]
    source = np.arange(ROWS) % 2
    first, share = RANKS.rank * ROWS // RANKS.world, ROWS // RANKS.world
    micro = micro or share // 2
    spans = [slice(at, at + micro) for at in range(first, first + share, micro)]
    return [collate(tokens[s], cuts[s], source[s]) for s in spans]


def train(engine: Engine, first: int, last: int, **keys: object) -> list[str]:
    """Losses of some steps, in hexadecimal."""
    return [engine.step(batches(step, **keys), step, 1.0 - 0.01 * step).loss.hex() for step in range(first, last)]


def whole_state(engine: Engine, folder: Path) -> dict[str, str]:
    """A hash of every gathered parameter and moment, through a checkpoint."""
    run = RunFolder(folder)
    run.make()
    store = CheckpointStore(run, RANKS, CheckpointConfig(keep_last=1))
    store.save(1, engine.state(), {})
    store.wait()
    wait_for(run)
    files = open_files(newest_readable(run))
    return {
        f"{name}|{kind}": hashlib.sha256(files.tensor(name, kind).numpy().tobytes()).hexdigest()
        for name in files.shapes
        for kind in files.kinds(name)
    } | {"updates": str(files.updates)}


def files_of(folder: Path) -> CheckpointFiles:
    """What a rank goes on with, as a run does."""
    return open_files(newest_readable(RunFolder(folder)), RANKS.rank, RANKS.world)


def wait_for(run: RunFolder) -> None:
    """Rank 0 commits in the background: all ranks wait for it."""
    from pretrain.parallel import barrier

    barrier()
    assert any(run.checkpoints.glob("step_*/manifest.json")), "rank 0 had waited for its commit"


def agree(out: Path, stages: list[str], precision: str, steps: int) -> object:
    """Losses and gradient norms of each stage over some steps."""
    results = {}
    for stage in stages:
        engine = engine_of(stage, precision)
        rows = [engine.step(batches(step), step, 1.0) for step in range(steps)]
        results[stage] = [[r.loss, r.grad_norm, r.source_loss, r.tokens] for r in rows]
    return results


def reshard(
    out: Path, writers: list[str], readers: list[str], precision: str = "fp32", source: str | None = None,
    counting: bool = False, trains: Literal["all", "own", "none"] = "all",
) -> object:  # fmt: skip
    """Save with each writer, or read what another layout saved at `source`, and go on with each reader: `trains` says
    whether all train then, those that read what they wrote themselves, or none."""
    results: dict[str, object] = {}
    for writer in writers:
        folder = (Path(source) if source else out) / f"saved-{writer}"
        if source is None:
            engine = engine_of(writer, precision, counting=counting)
            train(engine, 0, 4)
            results[f"{writer} state"] = whole_state(engine, folder)
            if trains != "none":
                results[f"{writer} losses"] = train(engine, 4, 8)
        for reader in readers:
            engine = engine_of(reader, precision, counting=counting)
            files = files_of(folder)
            engine.load(files)
            results[f"{writer}>{reader} opened"] = int(sum_over_ranks(torch.tensor([float(files.opened)])).item())
            results[f"{writer}>{reader} state"] = whole_state(engine, out / f"again-{writer}-{reader}")
            if trains == "all" or (trains == "own" and writer == reader):
                results[f"{writer}>{reader} losses"] = train(engine, 4, 8)
    return results


@contextlib.contextmanager
def faults_set(text: str) -> Iterator[None]:
    """Faults that are armed for a while."""
    os.environ["LEVIATHAN_FAULT"] = text
    faults.armed.cache_clear()
    yield
    del os.environ["LEVIATHAN_FAULT"]
    faults.armed.cache_clear()


def skip(out: Path, stages: list[str], precision: str) -> object:
    """A step whose loss is NaN on the last rank alone: what it changes, and that training goes on."""
    results = {}
    for stage in stages:
        engine = engine_of(stage, precision)
        train(engine, 0, 2)
        before = whole_state(engine, out / f"before-{stage}")
        with faults_set(f"step.before_update:{RANKS.world - 1}:2:nan"):
            result = engine.step(batches(2), 2, 1.0)
        after = whole_state(engine, out / f"after-{stage}")
        later = engine.step(batches(3), 3, 1.0)
        results[stage] = [result.skipped, result.grad_norm, before == after, later.skipped, later.loss]
    return results


def accumulate(out: Path, stages: list[str]) -> object:
    """The same global batch in micro-batches of 1, 2 and 4 rows."""
    results = {}
    for stage in stages:
        for micro in (1, 2, 4):
            engine = engine_of(stage, micro=micro)
            rows = [engine.step(batches(step, micro), step, 1.0) for step in range(3)]
            results[f"{stage} {micro}"] = [[r.loss, r.grad_norm] for r in rows]
    return results


def options(out: Path, stages: list[str], key: str) -> object:
    """Losses with a switch of the engine off and on, and after a reload with it on."""
    results: dict[str, object] = {}
    for stage in stages:
        for value in (False, True):
            engine = engine_of(stage, **{key: value})
            results[f"{stage} {value}"] = train(engine, 0, 4)
        results[f"{stage} state"] = whole_state(engine, out / f"{key}-{stage}")
        results[f"{stage} on"] = train(engine, 4, 6)
        engine = engine_of(stage, **{key: True})
        engine.load(files_of(out / f"{key}-{stage}"))
        results[f"{stage} again"] = train(engine, 4, 6)
    return results


def evaluation(out: Path, stages: list[str]) -> object:
    """The loss of a batch without gradient, before and after steps, and whether the model was in training for each."""
    results: dict[str, list[object]] = {}
    for stage in stages:
        engine = engine_of(stage)
        values, modes = results.setdefault(stage, []), results.setdefault(f"{stage} modes", [])
        for step in range(3):
            values.append(engine.evaluate(batches(50)[0]).total.item())
            modes.append(engine.model.training)
            engine.step(batches(step), step, 1.0)
            modes.append(engine.model.training)
    return results


def muon(out: Path, stages: list[str]) -> object:
    """Muon: losses, then a reload and the losses after it."""
    results = {}
    optim = OptimConfig(name="muon", lr=5e-3, muon_lr=0.01)
    for stage in stages:
        engine = engine_of(stage, optim=optim)
        first = train(engine, 0, 4)
        whole_state(engine, out / f"muon-{stage}")
        second = train(engine, 4, 6)
        engine = engine_of(stage, optim=optim)
        engine.load(files_of(out / f"muon-{stage}"))
        results[stage] = [first, second, train(engine, 4, 6)]
    return results


def models(out: Path, configs: dict[str, dict[str, object]], stages: list[str], steps: int = 3) -> object:
    """Losses and gradient norms of some models over some steps, by name and stage."""
    results = {}
    # stage 3 last, of all: DeepSpeed puts a slower product in place of torch's for it, and leaves it there
    for stage in stages:
        for name, config in configs.items():
            engine = engine_of(stage, model=checked(ModelConfig, Layers(dict(config))))
            rows = [engine.step(batches(step), step, 1.0) for step in range(steps)]
            results[f"{name} {stage}"] = [[r.loss, r.grad_norm] for r in rows]
    return results


def measures(out: Path, stages: list[str]) -> object:
    """What steps tell of a counting model, one of them skipped; its count after them; what it holds for whom."""
    results = {}
    for stage in stages:
        engine = engine_of(stage, counting=True)
        told = [engine.step(batches(step), step, 1.0).measures for step in range(2)]
        with faults_set(f"step.before_update:{RANKS.world - 1}:2:nan"):
            engine.step(batches(2), 2, 1.0)
        kinds: dict[str, list[str]] = {}
        for fragment in engine.state().fragments:
            kinds.setdefault(fragment.name, []).append(fragment.kind)
        results[stage] = [told, engine.model.counts.tolist(), kinds]
    return results


if __name__ == "__main__":
    work(globals())
