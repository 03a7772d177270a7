"""The objects of one rank of a run, built from its configuration: config in, `train()` called, everything closed."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, DataError
from data_pipeline.dataset import open_dataset
from data_pipeline.host_memory import keep_freed_memory
from data_pipeline.loader import Loader, check_divides
from data_pipeline.order import Order
from data_pipeline.places import public
from pretrain import metrics
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint_files import Checkpoint, newest_readable, open_files
from pretrain.config import RunConfig, micro_rows, tokens_per_step, total_steps
from pretrain.cost import cost_of, peak_flops
from pretrain.engine import Engine, TorchEngine
from pretrain.ensemble.combine import begin_from_seed, join
from pretrain.evaluate import HeldOut, evaluate, lacks_evaluation
from pretrain.faults import fault_point
from pretrain.grown import Grown, new_part
from pretrain.health import Heartbeat, StopRequests
from pretrain.init import initialise, materialise
from pretrain.lease import Lease
from pretrain.log import Log, Silence
from pretrain.member_names import MemberEngine
from pretrain.members import members_of
from pretrain.model import Model
from pretrain.models.build import build
from pretrain.ops.expert_parallel import shard_experts
from pretrain.optim import lr_scale
from pretrain.parallel import Ranks, finish, same_on_all_ranks
from pretrain.place import Place, beginning, numbering, place_of, reads_on, sources_of, tokens_before
from pretrain.run_folder import Record, RunFolder, counted
from pretrain.trainer import Plan, train


class Session:
    """One rank at work."""

    def __init__(self, folder: RunFolder, config: RunConfig, heartbeat: Heartbeat) -> None:
        self.folder, self.config, self.heartbeat = folder, config, heartbeat
        self.ranks = Ranks.from_environment()
        self.attempt = folder.attempt
        self.device = choose_device(config.engine.device, self.ranks)
        set_threads(config, self.ranks)
        keep_freed_memory()
        self.micro = micro_rows(config, self.ranks.world)
        check_divides(config.train.batch_rows, self.micro, self.ranks.world)
        self.dataset = open_dataset(config.data, self.ranks.rank, self.ranks.world)
        self.sources = list(config.data.sources)
        self._check_data()
        self._check_heldout()
        model = build(config.model, self.dataset.tokenizer.vocab)
        model.know_sources(self.sources)
        self.cost = cost_of(model)
        self.engine = make_engine(model, config, self.ranks, self.device, self.micro, len(self.sources))
        fence = int(os.environ.get("LEVIATHAN_FENCE", "0"))
        lease = Lease(folder.path) if fence else None
        self.store = CheckpointStore(
            folder, self.ranks, config.checkpoint, lease=lease, fence=fence, attempt=self.attempt
        )
        self.loader: Loader | None = None
        self.log: Log = Silence()

    def train(self, requests: StopRequests) -> int:
        """Find the place, and train from there to the end; return the exit code."""
        self.heartbeat.at("restore", 0)
        place = self._restore()
        self.store.check_room(self.engine.state())
        config, steps = self.config, total_steps(self.config)
        self.log = self._open_log(place) if self.ranks.first else Silence()
        order = self._order(place)
        self.loader = Loader(
            order,
            self.dataset.shards,
            batch_rows=config.train.batch_rows,
            micro_rows=self.micro,
            rank=self.ranks.rank,
            world=self.ranks.world,
            pin=self.device.type == "cuda",
        )
        self.loader.seek(place.rows)
        lacks = lacks_evaluation(self.folder, place.step, steps, config.eval.every)
        plan = Plan(
            place.step, steps, config.checkpoint.every, config.eval.every, config.train.max_skips, config.optim.lr,
            make_up=same_on_all_ranks([int(lacks)]) == [1],
        )  # fmt: skip
        self._tell_start(place, steps)
        code = train(
            self.engine,
            self.loader,
            self.store,
            self.log,
            plan,
            lr_scale=lr_scale(config.optim, steps),
            evaluate=self._evaluate,
            facts=lambda: self._facts(place),
            requests=requests,
            heartbeat=self.heartbeat,
        )
        if code == 0:
            self.log.event("done", f"trained to step {steps}", step=steps)
        return code

    def close(self) -> None:
        """Finish what is under way and leave the other ranks."""
        self.store.wait()
        if self.loader is not None:
            self.loader.close()
        self.heartbeat.at("end", 0)
        self.log.close()
        finish()

    # ---- where to go on

    def _restore(self) -> Place:
        own = self.store.newest_valid()
        found = own or self._branch_point()
        fresh = beginning(0, self._weights())
        origin = self.folder.facts().get("from")
        if found is None:
            self.engine.model.check_first_values(self.dataset.manifest.tokenizer.sha256)
        if found is None and origin is not None:
            self._begin_with(origin)
            return fresh
        if found is None:
            if self.ranks.first and self.attempt:
                self.folder.event("resume", "no checkpoint was saved yet: starting from step 0", step=0)
            return fresh
        fault_point("restore.begin", found.step)
        self._load(found, may_grow=own is None)
        fault_point("restore.middle", found.step)
        if self.ranks.first:
            self.folder.event("resume", f"resumed from {found.path.name}", step=found.step)
        if own is not None and sources_of(found.facts) != set(self.sources):
            raise ConfigError(
                f"{self.folder.name} was trained on {_listed(sources_of(found.facts))} and data.sources are"
                f" {_listed(self.sources)}; go on with the old ones, or begin a branch with --from and another run.name"
            )
        place = place_of(found.facts, self._weights())
        if reads_on(found.facts, numbering(self.config, self.dataset.manifest.fingerprint), self._weights()):
            return place
        if self.ranks.first:
            told = f"other shards, sources or order than of {found.path}: {_listed(self.sources)} from the beginning"
            self.folder.event("data", told, step=found.step)
        return beginning(found.step, self._weights(), place.tokens)

    def _branch_point(self) -> Checkpoint | None:
        """The checkpoint of another run that this one branches from, if it does."""
        origin = self.folder.facts().get("from")
        if origin is None or "run" not in origin:
            return None
        other = RunFolder(Path(origin["run"]))
        found = newest_readable(other, origin["step"])
        if found.facts["data"]["tokenizer"] != self.dataset.manifest.tokenizer.sha256:
            raise DataError(
                f"{other.path} was trained with another tokenizer ({found.facts['data']['tokenizer'][:12]}…, the shards"
                f" have {self.dataset.manifest.tokenizer.sha256[:12]}…); branch with data of the same tokenizer"
            )
        return found

    def _begin_with(self, origin: Record) -> None:
        """Begin a new run with parts that others trained: an ensemble with its modules, a module with its seed."""
        begin, parts = (join, origin["modules"]) if "modules" in origin else (begin_from_seed, origin["models"])
        config, tokenizer = self.config, self.dataset.manifest.tokenizer
        fault_point("restore.begin", 0)
        self.engine.load(begin(parts, config.model, tokenizer.vocab, tokenizer.sha256, config.run.seed))
        fault_point("restore.middle", 0)
        if self.ranks.first:
            told = ", ".join(f"{name} ({Path(of['run']).name}, step {of['step']})" for name, of in parts.items())
            self.folder.event("join", f"begins with {told}", step=0)

    def _load(self, found: Checkpoint, may_grow: bool) -> None:
        """Take over a checkpoint's state. may_grow: a frozen model may train a part that the checkpoint lacks."""
        model = build(self.config.model, self.dataset.tokenizer.vocab)
        new = new_part(model, found.facts["shapes"]) if may_grow else []
        self._check_shapes(found, new)
        files = open_files(found, self.ranks.rank, self.ranks.world)
        self.engine.load(Grown(files, model, self.config.run.seed, new) if new else files)
        if new and self.ranks.first:
            self.folder.event("grow", f"{found.path} has no {', '.join(new)}: they begin anew", step=found.step)

    def _check_shapes(self, found: Checkpoint, new: Collection[str]) -> None:
        shapes = self.engine.state().shapes
        mine = {name: list(shape) for name, shape in shapes.items() if name not in new}
        theirs = found.facts["shapes"]
        if mine == theirs:
            return
        name = next(n for n in [*mine, *theirs] if mine.get(n) != theirs.get(n))
        raise ConfigError(
            f"the model does not fit {found.path}: {name} is {mine.get(name, 'absent')} here and"
            f" {theirs.get(name, 'absent')} there; resume with the model it was trained with"
        )

    def _check_data(self) -> None:
        """The shards must be those the run began with."""
        manifest, known = self.dataset.manifest, self.folder.facts()
        stated = known.get("data_fingerprint", manifest.fingerprint)
        if stated != manifest.fingerprint:
            raise DataError(
                f"{public(self.config.data.dir)} holds other shards than this run began with (fingerprint"
                f" {manifest.fingerprint[:12]}…, the run has {stated[:12]}…); give data.dir the old ones, or"
                " start a new run"
            )
        if self.ranks.first:
            cost = cost_of(build(self.config.model, self.dataset.tokenizer.vocab))
            self.folder.set_facts(
                data_fingerprint=manifest.fingerprint,
                tokenizer_sha256=manifest.tokenizer.sha256,
                parameters=cost.parameters,
                flops_per_token=cost.flops_per_token,
            )

    def _check_heldout(self) -> None:
        held = sum(self.dataset.manifest.total("tokens", name, "heldout") for name in self.sources)
        if self.config.eval.every and held < 2:
            raise ConfigError(
                f"eval.every is {self.config.eval.every}, but the shards in {public(self.config.data.dir)} hold no"
                f" held-out text (data.heldout was {self.config.data.heldout}); set eval.every=0, or build with some"
                " held out"
            )

    # ---- parts

    def _weights(self) -> dict[str, float]:
        return {name: source.weight for name, source in self.config.data.sources.items()}

    def _order(self, place: Place) -> Order:
        (_, first), *changes = place.weights
        return Order(
            self.dataset.manifest,
            length=self.config.model.length,
            seed=self.config.run.seed,
            weights=first,
            window=self.config.data.window,
            changes=changes,
            skips=place.skips,
            names=self.sources,
        )

    def _facts(self, place: Place) -> dict[str, Any]:
        """What a checkpoint says of the run beside the engine's state."""
        assert self.loader is not None
        manifest, rows = self.dataset.manifest, self.loader.rows_consumed
        return {
            "run_id": self.folder.facts().get("run_id"),
            "zero": self.config.engine.zero,
            "engine": self.config.engine.name,
            "data": {
                "rows": rows,
                "tokens": tokens_before(self.config, place) + (rows - place.rows) * self.config.model.length,
                "weights": place.weights,
                "skips": place.skips,
                "tokenizer": manifest.tokenizer.sha256,
                **numbering(self.config, manifest.fingerprint),
            },
        }

    def _evaluate(self, step: int) -> Record:
        heldout = HeldOut(
            self.dataset.manifest, self.dataset.shards, self.sources, self.config.model.length, self.config.eval.rows
        )
        figures = evaluate(
            self.engine.evaluate,
            heldout,
            self.dataset.tokenizer.byte_lengths,
            self.ranks,
            batch_rows=self.config.eval.batch_rows,
            alive=lambda: self.heartbeat.at("evaluate", step),
            told_by=self.engine.model.figures,
        )
        return {"step": step, "attempt": self.attempt, **figures}

    def _open_log(self, place: Place) -> Log:
        config, per_step = self.config, tokens_per_step(self.config)
        meter = metrics.Meter(
            self.attempt,
            self.sources,
            per_step,
            self.cost.flops_per_token,
            others=tokens_before(config, place) - place.step * per_step,
            peak_flops_per_s=self._peak() * self.ranks.world,
            memory_mib=_cuda_memory if self.device.type == "cuda" else metrics.resident_mib,
            figures=self.engine.model.figures,
        )
        mirror = None
        log, shown = config.log, config.model_dump(mode="json")
        if log.wandb != "off":
            project, entity, group = log.wandb_project, log.wandb_entity, log.wandb_group
            mirror = metrics.WandbMirror(self.folder, log.wandb, project, entity, shown, group)
            mirror.start()
        return Log(self.folder, meter, mirror)

    def _peak(self) -> float:
        """Operations a second of one device; measured once in the life of a run, so that MFU means the same in all of
        its attempts."""
        if self.config.log.peak_tflops:
            return 1e12 * self.config.log.peak_tflops
        precision = self.config.engine.precision
        key = f"{self.ranks.host} {self.device.type} {precision} {torch.get_num_threads()} threads"
        known = self.folder.facts().get("peak_flops", {})
        if key not in known:
            known[key] = peak_flops(self.device, precision)
            self.folder.set_facts(peak_flops=known)
        return float(known[key])

    def _tell_start(self, place: Place, steps: int) -> None:
        self.log.event(
            "start",
            f"training step {place.step} to {steps} on {counted(self.ranks.world, 'rank')} ({self.config.engine.name},"
            f" ZeRO-{self.config.engine.zero}, {self.config.engine.precision}, {self.device.type})",
            step=place.step,
            steps=steps,
            world=self.ranks.world,
            host=self.ranks.host,
            torch=torch.__version__,
            parameters=self.cost.parameters,
            at=time.time(),
        )


def choose_device(wanted: str, ranks: Ranks) -> torch.device:
    """The device of this rank. Raises ConfigError where a wanted GPU is not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "engine.device is cuda, but torch sees no GPU here; set engine.device=cpu, or check the driver"
        )
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        raise ConfigError(
            f"rank {ranks.rank} on {ranks.host} is number {ranks.local_rank} on its host, which has {count} GPUs;"
            f" start at most {count} ranks there"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def set_threads(config: RunConfig, ranks: Ranks) -> None:
    """Give this rank its share of the host's cores: as its launcher has dealt them, or an equal one."""
    local = int(os.environ.get("LOCAL_SIZE", ranks.world))
    dealt = os.environ.get("OMP_NUM_THREADS", "")
    share = int(dealt) if dealt.isdigit() else (os.cpu_count() or 1) // local
    torch.set_num_threads(config.engine.threads or max(1, share))


def make_engine(
    model: Model, config: RunConfig, ranks: Ranks, device: torch.device, micro: int, sources: int
) -> Engine:
    """The engine over a model that is still on the meta device: memory, first values, optimizer, process group."""
    if config.engine.expert_parallel > 1:
        shard_experts(model, config.engine.expert_parallel, ranks)
    materialise(model, device)
    initialise(model, config.run.seed)
    if config.engine.activation_checkpointing:
        model.recompute()
    engine = _bare_engine(model, config, ranks, device, micro, sources)
    return MemberEngine(engine) if members_of(model) else engine


def _bare_engine(
    model: Model, config: RunConfig, ranks: Ranks, device: torch.device, micro: int, sources: int
) -> Engine:
    if config.engine.name == "torch":
        if ranks.world > 1:
            raise ConfigError(f"engine.name torch runs one rank, not {ranks.world}; set engine.name=deepspeed")
        return TorchEngine(model, config.optim, config.engine, sources=sources, seed=config.run.seed, device=device)
    from pretrain.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        config.optim,
        config.engine,
        sources=sources,
        seed=config.run.seed,
        device=device,
        batch_rows=config.train.batch_rows,
        micro_rows=micro,
    )


def _cuda_memory() -> float:
    return torch.cuda.max_memory_allocated() / 2**20


def _listed(sources: Iterable[str]) -> str:
    return ", ".join(sorted(sources))
