"""The engine protocol over DeepSpeed, ZeRO 0 to 3. Experts that ranks share are in pretrain/ops/expert_parallel.py.

Facts about DeepSpeed 0.19 that this file rests on, each held by a test:
- on a CPU it would compile a shared-memory extension at `init_distributed` and hang on the lock of a killed compiler;
- it divides gradients by the number of ranks, and clips by default;
- it skips the update when the gradient's norm is not finite, except in stage 0 with fp32, where we do;
- stages 1, 2 and bf16 keep fp32 masters in flat partitions that `_hp_mapping` locates; stage 3 in `grad_position`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from pretrain import optim
from pretrain.config import EngineConfig, OptimConfig
from pretrain.engine import (
    PARAM,
    EngineState,
    Fragment,
    FragmentReader,
    StepResult,
    Tally,
    Votes,
    global_count,
    no_votes,
    scaled,
    settled,
    shapes_of,
)
from pretrain.faults import fault_point
from pretrain.model import LossParts, Model
from pretrain.ops.expert_parallel import join_groups, shares_of, total_norm
from pretrain.parallel import Ranks, join, seed_step

Place = tuple[str, int, Tensor, dict[str, Tensor]]
"""A parameter's name, and of the part this rank owns: its offset, its fp32 master, its moments. All views."""
_MUON = "deepspeed.runtime.zero.muon.original_muon"


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, told about the device before it looks for itself, and quiet."""
    os.environ["DS_ACCELERATOR"] = device.type
    ranks = Ranks.from_environment()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_SIZE", ranks.world)):
        os.environ.setdefault(name, str(value))
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if _MUON not in sys.modules:
        # its Muon, which is not ours, is compiled as it is imported: more than a second of every start
        made, compiler.compile = compiler.compile, lambda: lambda function: function
        importlib.import_module(_MUON)
        compiler.compile = made
    if device.type == "cpu":
        # or a compiler runs at init_distributed, and a job killed meanwhile leaves a lock that hangs all later ones;
        # set where DeepSpeed keeps what it has found out, before it tries a compiler on each of its operations
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def start_distributed(device: torch.device, timeout_s: float) -> None:
    """Join the process group that the launcher's environment describes; a group of one where it describes none."""
    deepspeed = import_deepspeed(device)
    # DeepSpeed looks for both, and for an MPI where it misses them
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    join(backend, timeout_s)
    deepspeed.init_distributed(
        backend, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_s), verbose=False, dist_init_required=None
    )


class DeepSpeedEngine:
    """One rank of a DeepSpeed job."""

    def __init__(
        self, model: Model, optim_config: OptimConfig, config: EngineConfig, *, sources: int, seed: int,
        device: torch.device, batch_rows: int, micro_rows: int,
    ) -> None:  # fmt: skip
        self.model, self.device = model, device
        self._sources, self._seed, self._ranks = sources, seed, Ranks.from_environment()
        self._own_clip = optim_config.clip if config.zero == 0 and config.precision == "fp32" else None
        # of parameters of which this rank holds a part, and so do `copies` - 1 others
        self._shares, self._copies = shares_of(model), self._ranks.world // config.expert_parallel
        self._shapes = shapes_of(model) | {name: share.shape for name, share in self._shares.items()}
        groups = optim.param_groups(model, optim_config)
        self._kinds = {name: group["kind"] for group in groups for name in group["names"]}
        settings = _settings(optim_config, config, model, self._ranks.world, batch_rows, micro_rows)
        start_distributed(device, config.timeout_s)
        if self._shares:
            groups = join_groups(model, groups, config.expert_parallel)
        self._base = optim.make_optimizer(groups, optim_config)
        # stage 0 with bf16 makes one update without gradients at once: it must not decay weights, nor count
        optim.set_lr(self._base, 0.0)
        if config.compile:
            model.compile()
        self._engine, *_ = import_deepspeed(device).initialize(model=model, optimizer=self._base, config=settings)
        self._zero, self._updates = config.zero, 0
        self._prime()

    def step(self, batches: Sequence[Batch], step: int, lr_scale: float, votes: Votes = no_votes) -> StepResult:
        # DeepSpeed's own flag does not follow its eval()
        if not self.model.training:
            self._engine.train()
        seed_step(self._seed, step, self._ranks.rank)
        self.model.begin_step(step)
        tally = Tally(self._sources, self.device)
        count = global_count(batches, self.device)
        # DeepSpeed averages gradients over ranks; the loss is already divided by the count of all of them
        scale = self._ranks.world / count
        optim.set_lr(self._base, lr_scale)
        for number, batch in enumerate(batches):
            fault_point("step.before_forward", step)
            batch = batch.to(self.device)
            parts = self._engine(batch)
            self._engine.backward(scaled(parts.total, scale, step), scale_wrt_gas=False)
            tally.add(batch, parts)
            if number == len(batches) - 1:
                fault_point("step.before_update", step)
                grad_norm = self._own_norm() if self._own_clip is not None else None
            self._engine.step()
        if self._own_clip is None:
            grad_norm = self._their_norm()
        self._updates += grad_norm is not None
        result = tally.finish(float(count), grad_norm, sum(batch.tokens_BT.numel() for batch in batches), votes)
        return settled(self.model, result)

    def _own_norm(self) -> float | None:
        """Clip, or drop every gradient where the norm is not finite: an optimizer without gradients does nothing."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        shared = self._shares
        norm = total_norm(grads, shared, self._copies) if shared else nn.utils.get_total_norm(list(grads.values()))
        value = norm.item()
        if value - value != 0.0:
            for p in parameters:
                p.grad = None
            return None
        if self._own_clip:
            nn.utils.clip_grads_with_norm_(parameters, self._own_clip, norm)
        return value

    def _their_norm(self) -> float | None:
        if self._engine.optimizer.overflow:
            return None
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossParts:
        self._engine.eval()
        return self._engine(batch.to(self.device))

    def state(self) -> EngineState:
        fragments = []
        for name, offset, master, moments in self._places():
            at = self._first(name) + offset
            for kind, tensor in {PARAM: master, **moments}.items():
                fragments.append(Fragment(name, kind, at, tensor.detach().view(-1)))
        if self._ranks.first:
            fragments += [Fragment(name, PARAM, 0, buffer.view(-1)) for name, buffer in self._buffers()]
        return EngineState(fragments, self._shapes, self._updates)

    @torch.no_grad()
    def load(self, reader: FragmentReader) -> None:
        for name, offset, master, moments in self._places(everything=True):
            start = self._first(name) + offset
            stop = start + master.numel()
            master.view(-1).copy_(reader.read(name, PARAM, start, stop))
            for kind, tensor in moments.items():
                tensor.view(-1).copy_(reader.read(name, kind, start, stop))
        for name, buffer in self._buffers():
            buffer.view(-1).copy_(reader.read(name, PARAM, 0, buffer.numel()))
        self._refresh(reader)
        self._updates = reader.updates
        optim.set_updates(self._base, self._updates)

    def _prime(self) -> None:
        """Have the optimizer's state exist before the first step, so that a checkpoint can be loaded."""
        if self._zero == 3:
            flats = list(zip(self._engine.optimizer.fp32_partitioned_groups_flat, self._kind_of_flat()))
        else:
            flats = [(p, group["kind"]) for group in self._base.param_groups for p in group["params"]]
        for flat, kind in flats:
            optim.prime(self._base, [flat], kind)
        optim.set_updates(self._base, 0)

    def _kind_of_flat(self) -> list[str]:
        return [self._base.param_groups[g]["kind"] for g in self._engine.optimizer.sub_group_to_group_id.values()]

    def _places(self, everything: bool = False) -> Iterator[Place]:
        """What this rank owns. Stage 0 has all on every rank: ranks share the writing, unless `everything` is asked."""
        whole = {} if self._zero else self._whole_masters()
        for number, (name, p) in enumerate(self.model.named_parameters()):
            if hasattr(p, "ds_id"):
                place = self._place_stage3(name, p)
            elif hasattr(p, "_hp_mapping"):
                place = self._place_flat(name, p)
            else:
                mine = everything or self._writes(name, number)
                master = whole.get(name, p)
                place = (name, 0, master.data, self._moments(name, master)) if mine else None
            if place is not None:
                yield place

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The persistent ones: every rank has all of them, equal."""
        return [(name, buffer) for name, buffer in self.model.named_buffers() if name in self._shapes]

    def _writes(self, name: str, number: int) -> bool:
        """Whether of all ranks that have a parameter this one saves it. number: of the parameter."""
        copies = self._copies if name in self._shares else self._ranks.world
        return number % copies == self._ranks.rank // (self._ranks.world // copies)

    def _first(self, name: str) -> int:
        """The element of the whole parameter at which this rank's begins."""
        return self._shares[name].first if name in self._shares else 0

    def _whole_masters(self) -> dict[str, Tensor]:
        """Stage 0: the fp32 tensors that the optimizer updates, by name."""
        return {name: p for g in self._base.param_groups for name, p in zip(g["names"], g["params"])}

    def _place_flat(self, name: str, p: Any) -> Place | None:
        mapping = p._hp_mapping
        if mapping is None:
            return None
        flat = self._base.param_groups[mapping.param_group_index]["params"][0]
        start, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        moments = {key: value.narrow(0, start, count) for key, value in self._moments(name, flat).items()}
        return name, mapping.lp_fragment_address.start, flat.data.narrow(0, start, count), moments

    def _place_stage3(self, name: str, p: Any) -> Place | None:
        zero = self._engine.optimizer
        if not p.requires_grad:
            offset = self._ranks.rank * p.ds_tensor.ds_numel
            count = min(p.ds_tensor.ds_numel, p.ds_numel - offset)
            return (name, offset, p.ds_tensor.data.narrow(0, 0, count), {}) if count > 0 else None
        group, start, padded = zero.grad_position[zero.get_param_id(p)]
        offset = self._ranks.rank * padded
        count = min(padded, p.ds_numel - offset)
        if count <= 0:
            return None
        flat = zero.fp32_partitioned_groups_flat[group]
        moments = {key: value.narrow(0, start, count) for key, value in self._moments(name, flat).items()}
        return name, offset, flat.data.narrow(0, start, count), moments

    def _moments(self, name: str, holder: Tensor) -> dict[str, Tensor]:
        if name not in self._kinds:
            return {}
        return {key: self._base.state[holder][key] for key in optim.STATE_KEYS[self._kinds[name]]}

    def _refresh(self, reader: FragmentReader) -> None:
        """Bring the parameters that the model computes with in line with the masters just loaded."""
        zero = self._engine.optimizer
        parted = False
        for name, p in self.model.named_parameters():
            if hasattr(p, "_hp_mapping"):
                parted = True
            elif not hasattr(p, "ds_id"):
                start = self._first(name)
                p.data.copy_(reader.read(name, PARAM, start, start + p.numel()).view(p.shape))
        if parted:
            # from each other: of a checkpoint a rank reads no more than its own part
            zero.update_lp_params()
        if self._zero == 3:
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _settings(
    optim_config: OptimConfig, config: EngineConfig, model: nn.Module, world: int, batch_rows: int, micro_rows: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    count = sum(p.numel() for p in model.parameters())
    bucket = max(1 << 16, min(500_000_000, count))
    zero: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": bucket, "overlap_comm": False}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": sys.platform == "linux" and config.device == "cuda"}
    return {
        "train_batch_size": batch_rows,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": batch_rows // (micro_rows * world),
        # 0.0 switches clipping off; left out it would be 1.0
        "gradient_clipping": 0.0 if config.zero == 0 and config.precision == "fp32" else optim_config.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
