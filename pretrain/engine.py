"""What turns a loss into an update. The trainer sees this protocol and knows no DeepSpeed.

A step's loss is summed over all counted targets of the global batch and divided by their number, so packing, padding,
accumulation and the number of ranks cannot change its gradient. A loss or gradient that is not finite on any rank
makes every rank skip the update.

Names: a fragment is a contiguous piece of one parameter or persistent buffer, or of a parameter's moment, that this
rank owns. What is frozen has no moments and is kept in the precision that the model computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from data_pipeline.batch import IGNORE, Batch
from pretrain import optim
from pretrain.config import EngineConfig, OptimConfig
from pretrain.faults import fault_point, poisoned
from pretrain.model import LossParts, Model
from pretrain.parallel import Ranks, alone, seed_step, sum_over_ranks

PARAM = "param"
"""The kind of a fragment that is the value itself, of a parameter or of a buffer."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a flat parameter or buffer `name` (kind `param`), or of a moment.

    tensor: its elements [offset, offset + len), 1-D; saved as fp32, or as int64 where they are whole numbers.
    """

    name: str
    kind: str
    offset: int
    tensor: Tensor


@dataclass(frozen=True)
class EngineState:
    """All that must survive. shapes: of every parameter and buffer, by name. updates: how many the optimizer made."""

    fragments: list[Fragment]
    shapes: dict[str, tuple[int, ...]]
    updates: int


class FragmentReader(Protocol):
    """A checkpoint's tensors, whatever ranks and shards wrote them."""

    updates: int

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat parameter, buffer or moment, 1-D on the CPU."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step gave, equal on all ranks.

    loss: mean over the counted targets of the global batch, in nats. grad_norm: before clipping; None if not finite.
    skipped: whether the update was left out. source_loss: mean per source, None where a source had no target.
    votes: the sums over ranks of what each rank wished to tell. measures: of the global batch, as the model names them.
    """

    loss: float
    grad_norm: float | None
    skipped: bool
    tokens: int
    source_loss: list[float | None]
    votes: list[float]
    measures: Sequence[float] = ()


Votes: TypeAlias = Callable[[], Sequence[float]]
"""What a rank wishes to tell all ranks: some numbers, equally many on each."""


def no_votes() -> Sequence[float]:
    """Nothing to tell."""
    return ()


class Engine(Protocol):
    """One rank's part of training a model."""

    model: Model

    def step(self, batches: Sequence[Batch], step: int, lr_scale: float, votes: Votes = no_votes) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update on all ranks, or none on all.

        votes: asked at the very end, so that what happens during a step is known to all ranks with its sums.
        """
        ...

    def evaluate(self, batch: Batch) -> LossParts:
        """The loss of a batch without gradient. On ZeRO-3 every rank must call it equally often."""
        ...

    def state(self) -> EngineState:
        """Views of what this rank owns, valid until the next step."""
        ...

    def load(self, reader: FragmentReader) -> None:
        """Take parameters, moments and the count of updates from a checkpoint of any layout."""
        ...


class Tally:
    """Sums over the micro-batches of a step, kept on the device until they are asked for."""

    def __init__(self, sources: int, device: torch.device) -> None:
        self._sources, self._device = sources, device
        self._sums = torch.zeros(1 + 2 * sources, dtype=torch.float64, device=device)
        self._measures = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, batch: Batch, parts: LossParts) -> None:
        """Count in a micro-batch, the losses of its tokens and what the model measured."""
        loss_BT = parts.loss_BT
        if parts.measures is not None:
            measures = parts.measures.double()
            self._measures = self._measures + measures if len(self._measures) else measures
        if self._sources == 1:
            self._sums[0].add_(loss_BT.sum(dtype=torch.float64))
        else:
            row_loss = loss_BT.sum(1, dtype=torch.float64)
            self._sums[0].add_(row_loss.sum())
            counted = (batch.targets_BT != IGNORE).sum(1, dtype=torch.float64)
            self._sums[1 : 1 + self._sources].index_add_(0, batch.source_B, row_loss)
            self._sums[1 + self._sources :].index_add_(0, batch.source_B, counted)

    def finish(self, count: float, grad_norm: float | None, tokens: int, votes: Votes) -> StepResult:
        """Sum over ranks and wait for the numbers. count: counted targets of the global batch."""
        told = votes()
        if alone():
            values: list[float] = [*self._sums.tolist(), *self._measures.tolist(), *told]
        else:
            told_there = torch.tensor(told, dtype=torch.float64).to(self._device)
            values = sum_over_ranks(torch.cat((self._sums, self._measures, told_there))).tolist()
        total, rest = values[0], values[1:]
        sums, counts, rest = rest[: self._sources], rest[self._sources : 2 * self._sources], rest[2 * self._sources :]
        measures, votes_sum = rest[: len(self._measures)], rest[len(self._measures) :]
        by_source: list[float | None] = [total / count]
        if self._sources > 1:
            by_source = [s / c if c else None for s, c in zip(sums, counts)]
        return StepResult(total / count, grad_norm, grad_norm is None, tokens, by_source, votes_sum, measures)


def global_count(batches: Sequence[Batch], device: torch.device) -> Tensor | float:
    """Counted targets of the global batch: a scalar on `device`, or a number where there is nobody to ask."""
    count = float(sum(batch.count for batch in batches))
    return count if alone() else sum_over_ranks(torch.tensor(count, dtype=torch.float64, device=device))


def scaled(total: Tensor, scale: Tensor | float, step: int) -> Tensor:
    """The summed loss times `scale`, or NaN where the loss is not finite: then no gradient is finite either, on no
    rank, and every engine skips the step by the rule for gradients."""
    if poisoned(step):
        total = total * torch.nan
    # 0 times a number that is not finite is NaN, and 0 otherwise: one operation where a comparison takes several
    return total * (0.0 * total.detach() + scale).to(total.dtype)


def settled(model: Model, result: StepResult) -> StepResult:
    """The result, after the model was told its measures where an update was made."""
    if not result.skipped:
        model.settle(result.measures)
    return result


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter and persistent buffer, by name; to be asked before anything is sharded."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


class TorchEngine:
    """The reference: plain torch on one rank. bf16 keeps fp32 masters beside the model's bf16 parameters."""

    def __init__(
        self, model: Model, optim_config: OptimConfig, config: EngineConfig, *, sources: int, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.model, self.device, self._clip = model, device, optim_config.clip
        self._sources, self._seed, self._ranks = sources, seed, Ranks.from_environment()
        self._masters = _low_precision(model) if config.precision == "bf16" else {}
        self._names = dict(model.named_parameters())
        groups = optim.param_groups(model, optim_config)
        for group in groups:
            group["params"] = [self._masters.get(name, self._names[name]) for name in group["names"]]
        self.optimizer = optim.make_optimizer(groups, optim_config)
        for group in self.optimizer.param_groups:
            optim.prime(self.optimizer, group["params"], group["kind"])
        self._updates = 0
        self._forward = torch.compile(model) if config.compile else model

    def step(self, batches: Sequence[Batch], step: int, lr_scale: float, votes: Votes = no_votes) -> StepResult:
        if not self.model.training:
            self.model.train()
        seed_step(self._seed, step, self._ranks.rank)
        self.model.begin_step(step)
        tally = Tally(self._sources, self.device)
        count = global_count(batches, self.device)
        for batch in batches:
            fault_point("step.before_forward", step)
            batch = batch.to(self.device)
            parts = self._forward(batch)
            scaled(parts.total, 1.0 / count, step).backward()
            tally.add(batch, parts)
        fault_point("step.before_update", step)
        grad_norm = self._update(lr_scale)
        result = tally.finish(float(count), grad_norm, sum(batch.tokens_BT.numel() for batch in batches), votes)
        return settled(self.model, result)

    def _update(self, lr_scale: float) -> float | None:
        """Clip and update; return the gradient's norm, or None where it is not finite and nothing was done."""
        for name, master in self._masters.items():
            grad = self._names[name].grad
            master.grad = None if grad is None else grad.float()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in parameters]
        norm = nn.utils.get_total_norm(grads)
        value = norm.item()
        finite = value - value == 0.0
        if finite:
            if self._clip:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
            optim.set_lr(self.optimizer, lr_scale)
            self.optimizer.step()
            self._updates += 1
            self._refresh()
        self.optimizer.zero_grad(set_to_none=True)
        if self._masters:
            self.model.zero_grad(set_to_none=True)
        return value if finite else None

    @torch.no_grad()
    def _refresh(self) -> None:
        for name, master in self._masters.items():
            self._names[name].copy_(master)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossParts:
        self.model.eval()
        return self.model(batch.to(self.device))

    def state(self) -> EngineState:
        fragments = []
        for name, tensors in self._tensors():
            fragments += [Fragment(name, kind, 0, tensor.detach().view(-1)) for kind, tensor in tensors.items()]
        return EngineState(fragments, shapes_of(self.model), self._updates)

    @torch.no_grad()
    def load(self, reader: FragmentReader) -> None:
        for name, tensors in self._tensors():
            for kind, tensor in tensors.items():
                tensor.copy_(reader.read(name, kind, 0, tensor.numel()).view(tensor.shape))
        self._updates = reader.updates
        optim.set_updates(self.optimizer, self._updates)
        self._refresh()

    def _tensors(self) -> list[tuple[str, dict[str, Tensor]]]:
        """Per parameter and buffer its tensors: itself, and what the optimizer keeps where it is trained."""
        kept = {}
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                kept[name] = {key: self.optimizer.state[p][key] for key in optim.STATE_KEYS[group["kind"]]}
        values = self.model.state_dict()
        return [(n, {PARAM: self._masters.get(n, value), **kept.get(n, {})}) for n, value in values.items()]


def _low_precision(model: nn.Module) -> dict[str, nn.Parameter]:
    """Turn the model to bf16; return fp32 masters of its trainable parameters by name."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in trained}
    model.bfloat16()
    return masters
