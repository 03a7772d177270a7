"""The LeviathanModelEnsemble: modules of two coupled models, each for a kind of text, combined by what is relevant.

    h^m = (Norm(x_a) + Norm(x_b)) / 2,   z^m = (z_a + z_b) / 2             of the two models of module m
    p(x_{t+1} | x_<=t) = sum_m pi_{t,m} softmax(z^m_t + Delta z_t)          in one row, one document

`fusion` gives pi: `mhc`, a correlation over modules and positions (pretrain/ensemble/fusion.py); `posterior`, what the
tokens so far say for each module on top of its `prior`, which needs no training: never worse than module m by more than
-log prior_m a document, log M where all are alike (DEMix, arXiv 2108.05036; Branch-Train-Merge, arXiv 2208.03306);
`clusters`, the distance of what was read to each module's cluster of text (pretrain/ensemble/nearest.py); `uniform`. A
module alone is trained first, by its own loss and a part of its two models' own.

Source: "Leviathan" (attention-free-revolution) names eight models in four modules and "only the relevant part"; every
equation here is this project's.

Shapes: M modules, K = 2 M models, B rows, T tokens, N = B T, D width, V vocabulary, F width of the fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, UsageError
from data_pipeline.batch import IGNORE, Batch
from pretrain.config import ModelConfig
from pretrain.ensemble.config import remaining
from pretrain.ensemble.fusion import Fused, Fusion
from pretrain.ensemble.losses import Heads, evidence, module_logits, module_losses
from pretrain.ensemble.nearest import Nearest
from pretrain.ensemble.pairs import Pairs, Ran
from pretrain.ensemble.shapes import Order, groups_of
from pretrain.groups import grouped, parts_of
from pretrain.layout import Layout
from pretrain.model import LossParts, Model
from pretrain.models.language_model import going_on, with_aux
from pretrain.ops.scan import exact


class StreamState(NamedTuple):
    """Where a stream stands. layers: of each group of modules of one shape. evidence_MB, last_MBV: what was told so
    far, and log p of the token that comes."""

    layers: tuple[Any, ...]
    fusion: Any
    evidence_MB: Tensor
    last_MBV: Tensor
    pos_B: Tensor
    doc_B: Tensor


class LeviathanModelEnsemble(Model):
    """All modules at once; with one module, what is trained before they are joined."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.config, self.vocab, self.length = config.ensemble, vocab, config.length
        if config.stack.name != ModelConfig().stack.name or config.logits.hidden:
            raise ConfigError("an ensemble's models are plain blocks; leave model.stack and model.logits as they are")
        self.modules_named = list(config.ensemble.modules)
        self.order = Order(config)
        self.models = grouped([_pairs(group, vocab, config) for group in groups_of(config)])
        self.fusion = Fusion(config, vocab) if config.ensemble.fusion == "mhc" else None
        self.nearest = Nearest(config.ensemble, vocab) if config.ensemble.fusion == "clusters" else None
        self.present = [True] * len(self.modules_named)
        self._sources: list[str] = []
        self._step = 0
        for pairs in self._groups():
            frozen: dict[str, list[nn.Module]] = {"modules": [pairs], "embeddings": [pairs.embed], "none": []}
            for part in frozen[config.ensemble.freeze]:
                part.requires_grad_(False)

    # ---- losses

    def forward(self, batch: Batch) -> LossParts:
        layout = Layout(batch.doc_BT, batch.pos_BT, not batch.packed)
        ran = self._run(batch.tokens_BT, layout)
        passes = [self._parts(groups, layout, batch) for groups in zip(*(of_group.h_KBTD for of_group in ran))]
        total = passes[0].total if len(passes) == 1 else torch.stack([parts.total for parts in passes]).mean()
        shares = [len(places) / len(self.modules_named) for places in self.order.groups]
        auxes = [aux._replace(loss=share * aux.loss) for share, of_group in zip(shares, ran) for aux in of_group.auxes]
        if auxes:
            total, _ = with_aux(total, tuple(auxes), batch.count)
        return passes[-1]._replace(total=total)

    def _parts(self, groups: Sequence[Tensor], layout: Layout, batch: Batch) -> LossParts:
        """The loss of what one pass gives, without that of channel mixers. groups: h_KBTD of the models of each."""
        (log_pi_MBT, log_all_MBT, found_BTF), _ = self._weighed(batch.tokens_BT, groups, layout, None)
        found_NF = None if found_BTF is None else found_BTF.flatten(0, 1)
        alone, targets_N = len(self.modules_named) == 1, batch.targets_BT.reshape(-1)
        told = [
            module_losses(h_KBTD.flatten(1, 2), found_NF, heads, targets_N, alone)
            for h_KBTD, heads in zip(groups, self._heads())
        ]
        loss_MBT = self.order.of_all([loss_MN for loss_MN, _ in told]).unflatten(1, batch.targets_BT.shape)
        if self.config.fusion == "posterior":
            before_MB = loss_MBT.new_zeros(loss_MBT.shape[:2])
            told_MBT = _arrived(loss_MBT, layout)
            log_pi_MBT = self._posterior(evidence(told_MBT, layout, before_MB, self.config.memory))
            # evidence grows with a document: from one token in a million on, no more is asked of the right module
            log_all_MBT = log_pi_MBT.clamp_min(-13.8)
        counted_BT = batch.targets_BT != IGNORE
        loss_BT = -torch.logsumexp(log_pi_MBT - loss_MBT, dim=0).masked_fill(~counted_BT, 0.0)
        total = loss_BT.sum()
        own_KN = told[0][1]
        if own_KN is not None:
            total = total + self.config.alone_loss * own_KN.sum()
        elif self.training:
            total = total + self._joint_losses(batch, log_all_MBT, loss_MBT, counted_BT)
        return LossParts(total, loss_BT.detach(), self._measures(batch, log_pi_MBT, loss_MBT, counted_BT))

    def _run(self, tokens_BT: Tensor, layout: Layout, states: Sequence[Any] | None = None) -> list[Ran]:
        """All models, a group of one shape after the other."""
        groups = self._groups()
        return [pairs(tokens_BT, layout, own) for pairs, own in zip(groups, states or [None] * len(groups))]

    def _groups(self) -> list[Pairs]:
        return parts_of(self.models)

    def _weighed(self, tokens_BT: Tensor, groups: Sequence[Tensor], layout: Layout, state: Any) -> tuple[Fused, Any]:
        """As `_relevance`; by clusters, tokens alone say it."""
        if self.nearest is None:
            return self._relevance(groups, layout, state)
        score_MBT, state = self.nearest(tokens_BT, layout, state)
        return Fused(self._among_present(score_MBT), score_MBT.log_softmax(0), None), state

    def _relevance(self, groups: Sequence[Tensor], layout: Layout, state: Any) -> tuple[Fused, Any]:
        """What is relevant to each token where that does not depend on losses, else all alike; the fusion's state."""
        if self.fusion is not None:
            of_modules = [h_KBTD.unflatten(0, (-1, 2)).mean(1) for h_KBTD in groups]
            return self.fusion(of_modules, layout, self.present, state)
        like, size = groups[0], (len(self.present), *groups[0].shape[1:3])
        alike_MBT = self._among_present(like.new_zeros(size, dtype=exact(like.dtype)))
        return Fused(alike_MBT, alike_MBT, None), state

    def _posterior(self, evidence_MBT: Tensor) -> Tensor:
        """Log of what modules are worth, by their prior and what was told."""
        if self.config.prior:
            shares = [self.config.prior[name] for name in self.modules_named]
            # against the largest: so that equal shares add nothing, to the bit
            against = [log(share) - log(max(shares)) for share in shares]
            evidence_MBT = evidence_MBT + evidence_MBT.new_tensor(against).view(-1, 1, 1)
        return self._among_present(evidence_MBT)

    def _among_present(self, score_MBT: Tensor) -> Tensor:
        there = torch.tensor(self.present, device=score_MBT.device).view(-1, 1, 1)
        return score_MBT.masked_fill(~there, -torch.inf).log_softmax(0)

    def _joint_losses(self, batch: Batch, log_all_MBT: Tensor, loss_MBT: Tensor, counted_BT: Tensor) -> Tensor:
        """What is added to the mixture's loss, summed over counted targets: of the right module, where it is known.

        log_all: relevance before any module is left out, or the one that should have been kept would never hear of it.
        """
        config, right_B = self.config, self._right_modules(batch.source_B)
        known_B = right_B >= 0
        at = right_B.clamp_min(0)[None, :, None].expand(1, *counted_BT.shape)
        of_right_BT = counted_BT & known_B[:, None]
        extra = config.own_loss * (loss_MBT.gather(0, at)[0] * of_right_BT).sum()
        weight = config.domain_loss * max(0.0, 1 - self._step / config.domain_steps) if config.domain_steps else 0.0
        if weight:
            judged_BT = of_right_BT & (batch.pos_BT >= config.domain_from)
            extra = extra - weight * (log_all_MBT.gather(0, at)[0] * judged_BT).sum()
        if config.balance_loss:
            unknown_BT = counted_BT & ~known_B[:, None]
            share_M = (log_all_MBT.exp() * unknown_BT).sum((1, 2)) / unknown_BT.sum().clamp_min(1)
            extra = extra + config.balance_loss * len(share_M) * share_M.square().sum() * unknown_BT.sum()
        return extra

    def _right_modules(self, source_B: Tensor) -> Tensor:
        """The number of the module that each row's source is for; -1 where none is."""
        names = [self.config.domains.get(name, name) for name in self._sources]
        numbers = [self.modules_named.index(n) if n in self.modules_named else -1 for n in names] or [-1]
        return torch.tensor(numbers, device=source_B.device)[source_B.clamp_max(len(numbers) - 1)]

    def _heads(self) -> list[Heads]:
        """Of each group."""
        out = None if self.fusion is None else self.fusion.out.weight
        return [Heads(*pairs.head_weights(), out) for pairs in self._groups()]

    # ---- decoding, which is also what logits are made by

    def logits(self, tokens_BT: Tensor, layout: Layout) -> Tensor:
        """(B, T, V): log of the mixture's probabilities."""
        groups = [of_group.h_KBTD[-1] for of_group in self._run(tokens_BT, layout)]
        fused, _ = self._weighed(tokens_BT, groups, layout, None)
        return self._mixed(groups, fused, tokens_BT, layout, *self._nothing_told(len(tokens_BT), groups[0]))[0]

    def decode(self, tokens_BT: Tensor, state: StreamState, layout: Layout | None = None) -> tuple[Tensor, StreamState]:
        layout = layout or going_on(state.pos_B, state.doc_B, tokens_BT.shape[1])
        if self._groups()[0].places is not None and int(layout.pos_BT.max()) >= self.length:
            raise UsageError(
                f"this model has learned positions for {self.length} tokens and cannot go on after them;"
                " use a shorter prompt or fewer tokens, or train with model.positions rope"
            )
        ran = self._run(tokens_BT, layout, state.layers)
        groups, layers = [of_group.h_KBTD[-1] for of_group in ran], tuple(of_group.states for of_group in ran)
        fused, fusion = self._weighed(tokens_BT, groups, layout, state.fusion)
        told = (state.evidence_MB, state.last_MBV)
        mixed, evidence_MB, last_MBV = self._mixed(groups, fused, tokens_BT, layout, *told)
        after = StreamState(layers, fusion, evidence_MB, last_MBV, layout.pos_BT[:, -1], layout.doc_BT[:, -1])
        return mixed, after

    def _mixed(
        self,
        groups: Sequence[Tensor],
        fused: Fused,
        tokens_BT: Tensor,
        layout: Layout,
        before_MB: Tensor,
        last_MBV: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, V) log p of the mixture, and the evidence and each module's log p at the end."""
        log_pi_MBT, _, found_BTF = fused
        found_NF = None if found_BTF is None else found_BTF.flatten(0, 1)
        told = [module_logits(h.flatten(1, 2), found_NF, heads) for h, heads in zip(groups, self._heads())]
        log_p_MBTV = self.order.of_all(told).log_softmax(-1).unflatten(1, tokens_BT.shape)
        if self.config.fusion == "posterior":
            expected = torch.cat((last_MBV[:, :, None], log_p_MBTV[:, :, :-1]), dim=2)
            ids = tokens_BT[None, :, :, None].expand(len(expected), *tokens_BT.shape, 1)
            told_MBT = -expected.gather(-1, ids).squeeze(-1).masked_fill(layout.pos_BT == 0, 0.0)
            evidence_MBT = evidence(told_MBT, layout, before_MB, self.config.memory)
            log_pi_MBT, before_MB = self._posterior(evidence_MBT), evidence_MBT[:, :, -1]
        return torch.logsumexp(log_pi_MBT[..., None] + log_p_MBTV, dim=0), before_MB, log_p_MBTV[:, :, -1]

    def _nothing_told(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        size = (len(self.modules_named), rows)
        return like.new_zeros(size), like.new_zeros(*size, self.vocab)

    def initial_state(self, rows: int) -> StreamState:
        like, groups = self._heads()[0].weight_KVD, self._groups()
        fusion: Any = None if self.fusion is None else self.fusion.initial_state(rows, like)
        fusion = fusion if self.nearest is None else self.nearest.initial_state(rows)
        ones = torch.ones(rows, dtype=torch.long, device=like.device)
        layers = tuple(pairs.initial_state(rows) for pairs in groups)
        return StreamState(layers, fusion, *self._nothing_told(rows, like), -ones, 0 * ones)

    # ---- what it is asked besides

    def without(self, names: Sequence[str]) -> None:
        """From now on leave these modules out; the relevance of the others adds up to 1. Raises UsageError."""
        kept = remaining(self.modules_named, names)
        self.present = [name in kept for name in self.modules_named]

    def know_sources(self, sources: Sequence[str]) -> None:
        """Told the names that `Batch.source_B` numbers: by them it knows whose text a row is."""
        self._sources = list(sources)

    def begin_step(self, step: int) -> None:
        self._step = step

    def check_first_values(self, tokenizer: str) -> None:
        """Of clusters their file is needed, and that of this tokenizer."""
        if self.nearest is not None:
            self.nearest.check_first_values(tokenizer)

    def measure_names(self) -> list[str]:
        if len(self.modules_named) == 1:
            return []
        of_each = [f"{what}/{name}" for what in ("relevance", "loss") for name in self.modules_named]
        return [f"{source}/{what}" for source in self._sources for what in ("tokens", *of_each)]

    def figures(self, measures: Sequence[float]) -> dict[str, float]:
        """Means over the tokens of a source, where it had any."""
        sums, out = dict(zip(self.measure_names(), measures)), {}
        for name, value in sums.items():
            tokens = sums[f"{name.split('/')[0]}/tokens"]
            if tokens and not name.endswith("/tokens"):
                out[name] = value / tokens
        return out

    def _measures(self, batch: Batch, log_pi_MBT: Tensor, loss_MBT: Tensor, counted_BT: Tensor) -> Tensor | None:
        """Per source: counted tokens, and sums over them of relevance and loss of each module."""
        if not self.measure_names():
            return None
        with torch.no_grad():
            parts = torch.cat((torch.ones_like(loss_MBT[:1]), log_pi_MBT.exp(), loss_MBT))
            rows_BP = (parts * counted_BT).sum(2).T.double()
            sums = rows_BP.new_zeros(len(self._sources), rows_BP.shape[1])
            return sums.index_add_(0, batch.source_B, rows_BP).flatten()

    def flops_per_token(self) -> int:
        fusion = 0 if self.fusion is None else self.fusion.flops_per_token(self.length)
        fusion = fusion if self.nearest is None else self.nearest.flops_per_token()
        return sum(pairs.flops_per_token(self.length) for pairs in self._groups()) + fusion

    def state_bytes(self, length: int) -> int:
        fusion = 0 if self.fusion is None else self.fusion.state_bytes(length)
        fusion = fusion if self.nearest is None else self.nearest.state_bytes()
        told = 2 * len(self.modules_named) * (1 + self.vocab)
        return sum(pairs.state_bytes(length) for pairs in self._groups()) + fusion + told

    def recompute(self) -> None:
        for pairs in self._groups():
            pairs.recompute = True

    def segments(self) -> Sequence[nn.Module]:
        return [layer for pairs in self._groups() for layer in pairs.layers]


def _pairs(group: ModelConfig, vocab: int, whole: ModelConfig) -> Pairs:
    """The models of one shape. Raises ConfigError, with whose it is, for one that the parts do not fit."""
    try:
        return Pairs(group, vocab)
    except ConfigError as error:
        if (group.width, group.depth) == (whole.width, whole.depth):
            raise
        raise ConfigError(f"model.ensemble.shapes.{group.ensemble.modules[0]}: {error}") from None


def _arrived(loss_MBT: Tensor, layout: Layout) -> Tensor:
    """Each module's loss of token t given those before it: that of the target of t - 1; 0 at a document's start."""
    return torch.nn.functional.pad(loss_MBT[:, :, :-1], (1, 0)).masked_fill(layout.pos_BT == 0, 0.0)
