"""Combination of modules by clusters of text: a module is relevant as far as the text so far is near its cluster.

    e_t = unit(sum over s <= t of table[bucket(x_{s-n+1}, ..., x_s)])         within one document
    pi_{t,m} = exp(-|e_t - c_m|^2 / temperature) / sum over m'

Nothing is trained: table and centres c_m are what `leviathan data cluster` found (data_pipeline/clusters.py). They are
parameters that no gradient changes, so checkpoints hold them, and their file is read only where a run begins.

Source: c-BTM (arXiv 2303.14177) weighs experts so, by tf-idf of the context; hashed n-grams of ids, summed up within a
document in a single pass, are this project's.

Shapes: M modules, B rows, T tokens, E width of an embedding, n ids in a gram, G = n - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import ConfigError, DataError, LeviathanError
from data_pipeline.clusters import Clusters, bucket, check_names, load
from pretrain.ensemble.config import EnsembleConfig
from pretrain.init import declare, values
from pretrain.layout import Layout
from pretrain.ops.scan import exact


class Read(NamedTuple):
    """What a stream read: sum_BE of its document's rows of the table, float64; ids_BG, the last n - 1 ids."""

    sum_BE: Tensor
    ids_BG: Tensor


class Nearest(nn.Module):
    """Relevance of modules by the distance of what was read to their clusters' centres."""

    def __init__(self, config: EnsembleConfig, vocab: int) -> None:
        super().__init__()
        self.config, self.vocab, self.names = config.clusters, vocab, list(config.modules)
        own = config.clusters
        self.table = nn.Parameter(torch.empty(own.buckets, own.width), requires_grad=False)
        self.centres = nn.Parameter(torch.empty(len(self.names), own.width), requires_grad=False)
        declare(
            self,
            {
                "table": values(self._first(lambda found: torch.from_numpy(found.table_HE), own.buckets)),
                "centres": values(self._first(self._own_centres, len(self.names))),
            },
        )

    def _first(self, part: Callable[[Clusters], Tensor], rows: int) -> Callable[[], Tensor]:
        """What fills a parameter: of the file; where that cannot be used, no numbers, as whoever loads a checkpoint
        needs none. Whether they are needed is asked by `check_first_values`."""

        def make() -> Tensor:
            try:
                return part(self._clusters())
            except LeviathanError:
                return torch.full((rows, self.config.width), torch.nan)

        return make

    def _own_centres(self, found: Clusters) -> Tensor:
        """(M, E): the centres of those clusters that are modules here, for some may be left out."""
        return torch.from_numpy(found.centres_KE[[found.facts.names.index(name) for name in self.names]])

    def _clusters(self) -> Clusters:
        """What the file holds. Raises ConfigError or DataError where there is none, or it does not suit this model."""
        path = Path(self.config.file or "").expanduser()
        found = load(path)
        facts = found.facts
        check_names(self.names, facts.names, path)
        for what, there, here in (
            ("vocabulary", facts.vocab, self.vocab), ("ids", facts.ids, self.config.ids),
            ("buckets", facts.buckets, self.config.buckets), ("width", facts.width, self.config.width),
        ):  # fmt: skip
            if there != here:
                raise ConfigError(
                    f"{path} was made with {what} {there:,}, and here it is {here:,}; give the clusters.yaml beside it,"
                    " and the tokenizer that it names"
                )
        return found

    def check_first_values(self, tokenizer: str) -> None:
        """Raise ConfigError or DataError where the first values are not clusters of this tokenizer (its sha256)."""
        theirs = self._clusters().facts.tokenizer
        if theirs != tokenizer:
            raise DataError(
                f"{self.config.file} was made with another tokenizer ({theirs[:12]}…, the shards have"
                f" {tokenizer[:12]}…); give the clusters.yaml beside it, and build shards with that"
            )

    def forward(self, ids_BT: Tensor, layout: Layout, state: Read | None = None) -> tuple[Tensor, Read]:
        """(M, B, T) log pi up to what all modules have in common, in fp32 at least; what was read."""
        state = self.initial_state(len(ids_BT)) if state is None else state
        rows_BTE = self.table[self._buckets(ids_BT, layout, state.ids_BG)].double()
        # sums of a document are differences of sums of the row: exact enough in float64 only
        sums_BSE = torch.cat((state.sum_BE[:, None], rows_BTE), dim=1).cumsum(1)
        begin_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) - layout.pos_BT
        before_BTE = sums_BSE.gather(1, begin_BT.clamp_min(0)[..., None].expand_as(rows_BTE))
        goes_on_BT1 = (begin_BT < 0)[..., None]  # in the document that the state is in
        so_far_BTE = sums_BSE[:, 1:] - before_BTE.masked_fill(goes_on_BT1, 0.0)
        dtype = exact(self.table.dtype)
        e_BTE, centres_ME = F.normalize(so_far_BTE, dim=-1, eps=1e-30).to(dtype), self.centres.to(dtype)
        # |e - c|^2 without |e|^2, which is the same for all
        far_BTM = centres_ME.square().sum(1) - 2 * (e_BTE @ centres_ME.T)
        last = torch.cat((state.ids_BG, ids_BT), dim=1)[:, ids_BT.shape[1] :]
        return (-far_BTM / self.config.temperature).permute(2, 0, 1), Read(so_far_BTE[:, -1], last)

    def _buckets(self, ids_BT: Tensor, layout: Layout, before_BG: Tensor) -> Tensor:
        """(B, T): the bucket at every token; ids before its document are none, which is the vocabulary's size."""
        length, whole = ids_BT.shape[1], torch.cat((before_BG, ids_BT), dim=1)
        gram = []
        for back in range(self.config.ids - 1, -1, -1):
            first = self.config.ids - 1 - back
            gram.append(whole[:, first : first + length].masked_fill(layout.pos_BT < back, self.vocab))
        return bucket(gram, self.config.buckets)

    def initial_state(self, rows: int) -> Read:
        """The state before the first token of `rows` streams."""
        device, own = self.table.device, self.config
        ids_BG = torch.full((rows, own.ids - 1), self.vocab, dtype=torch.long, device=device)
        return Read(torch.zeros(rows, own.width, dtype=torch.float64, device=device), ids_BG)

    def flops_per_token(self) -> int:
        """Operations per token: a row of the table, and a product with each centre."""
        return self.config.width * (1 + 2 * len(self.names))

    def state_bytes(self) -> int:
        """Bytes of the state of one sequence, in bf16."""
        return 2 * (self.config.width + self.config.ids - 1)
