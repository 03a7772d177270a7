"""The language model: embed, a stack, norm, loss.

    x = Stack(embed(tokens));   logits = Head(Norm(x))

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipeline.batch import Batch
from pretrain import stack
from pretrain.block import dropped
from pretrain.channel import Aux, Teller
from pretrain.config import ModelConfig
from pretrain.init import embedding
from pretrain.layout import Layout
from pretrain.mixer import State
from pretrain.model import LossParts, Model
from pretrain.models.head import Head
from pretrain.norms import make_norm
from pretrain.stack import StackOutput


class StreamState(NamedTuple):
    """Where a stream of text stands: the stack's state, and the position and document of the last token (B,)."""

    stack: State
    pos_B: Tensor
    doc_B: Tensor


class LanguageModel(Model):
    """A causal language model over any stack."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.vocab, self.length = vocab, config.length
        self.width, self.dropout = config.width, config.dropout
        self.embed = embedding(vocab, config.width)
        self.places = embedding(config.length, config.width) if config.positions == "learned" else None
        self.blocks = stack.make(config)
        self.norm = make_norm(config.norm, config.width, config.bias)
        self.head = Head(config, vocab)
        if config.logits.freeze_backbone:
            self.head.freeze_others(self)

    def forward(self, batch: Batch) -> LossParts:
        layout = Layout(batch.doc_BT, batch.pos_BT, not batch.packed)
        outputs, auxes = self.blocks.training_outputs(self._embedded(batch.tokens_BT, layout, False), layout)
        if not torch.is_grad_enabled():
            outputs = outputs[-1:]
        targets_N, totals = batch.targets_BT.reshape(-1), []
        for x_BTD in outputs:
            total, loss_N = self.head(self.norm(x_BTD).flatten(0, 1), self._tied(), targets_N)
            totals.append(total)
        total, measures = totals[0] if len(totals) == 1 else torch.stack(totals).mean(), None
        if auxes:
            total, measures = with_aux(total, auxes, batch.count)
        return LossParts(total, loss_N.view(batch.targets_BT.shape), measures)

    def logits(self, tokens_BT: Tensor, layout: Layout) -> Tensor:
        return self.head.logits(self.hidden(tokens_BT, layout).x_BTD, self._tied())

    def initial_state(self, rows: int) -> StreamState:
        like = self.embed.weight
        ones = torch.ones(rows, dtype=torch.long, device=like.device)
        return StreamState(self.blocks.initial_state(rows, like), -ones, 0 * ones)

    def decode(self, tokens_BT: Tensor, state: StreamState, layout: Layout | None = None) -> tuple[Tensor, StreamState]:
        layout = layout or going_on(state.pos_B, state.doc_B, tokens_BT.shape[1])
        out = self.hidden(tokens_BT, layout, state.stack)
        logits_BTV = self.head.logits(out.x_BTD, self._tied())
        return logits_BTV, StreamState(out.state, layout.pos_BT[:, -1], layout.doc_BT[:, -1])

    def hidden(self, tokens_BT: Tensor, layout: Layout, state: State = None) -> StackOutput:
        """The stack's output with (B, T, D) after the last norm."""
        out = self.blocks(self._embedded(tokens_BT, layout, state is not None), layout, state)
        return out._replace(x_BTD=self.norm(out.x_BTD))

    def flops_per_token(self) -> int:
        return self.blocks.flops_per_token(self.length) + self.head.flops_per_token()

    def state_bytes(self, length: int) -> int:
        return self.blocks.state_bytes(length)

    def recompute(self) -> None:
        self.blocks.recompute_segments()

    def segments(self) -> Sequence[nn.Module]:
        return self.blocks.segments()

    def measure_names(self) -> list[str]:
        return [f"blocks.{path}/{name}" for path, teller in self.blocks.tellers() for name in teller.measure_names()]

    def figures(self, measures: Sequence[float]) -> dict[str, float]:
        told = self._told(measures)
        return {f"blocks.{path}/{name}": v for path, m, own in told for name, v in m.figures(own).items()}

    def settle(self, measures: Sequence[float]) -> None:
        for _, teller, own in self._told(measures):
            teller.settle(own)

    def _told(self, measures: Sequence[float]) -> Iterator[tuple[str, Teller, Sequence[float]]]:
        """The parts that tell something, each with its own of the measures."""
        at = 0
        for path, teller in self.blocks.tellers():
            count = len(teller.measure_names())
            yield path, teller, measures[at : at + count]
            at += count

    def _embedded(self, tokens_BT: Tensor, layout: Layout, streaming: bool) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        if self.places is not None:
            x_BTD = x_BTD + self.places(self._checked_places(layout, streaming))
        return dropped(x_BTD, self.dropout, self.training)

    def _tied(self) -> Tensor | None:
        return self.embed.weight if self.head.weight is None else None

    def _checked_places(self, layout: Layout, streaming: bool) -> Tensor:
        # only a stream can run past the table; asking costs a wait for the device, so training does not
        if streaming and int(layout.pos_BT.max()) >= self.length:
            raise UsageError(
                f"this model has learned positions for {self.length} tokens and cannot go on after them;"
                " use a shorter prompt or fewer tokens, or train with model.positions rope"
            )
        return layout.pos_BT


def with_aux(total: Tensor, auxes: tuple[Aux, ...], count: int) -> tuple[Tensor, Tensor]:
    """The summed loss with auxiliary losses, means over the micro-batch, weighted by its `count` of targets; and the
    measures one after the other. Auxiliary losses alone depend on how a batch is cut into micro-batches."""
    extra = torch.stack([aux.loss for aux in auxes]).sum()
    return total + count * extra.to(total.dtype), torch.cat([aux.measures for aux in auxes])


def going_on(pos_B: Tensor, doc_B: Tensor, length: int) -> Layout:
    """The layout of `length` tokens that go on in the documents of their streams."""
    pos_BT = pos_B[:, None] + torch.arange(1, length + 1, device=pos_B.device)
    return Layout(doc_B[:, None].expand_as(pos_BT), pos_BT, False)
