"""Experts on different ranks: each of `size` neighbouring ranks holds a part of them and reads every rank's tokens.

    count rows for each rank -> rows to the ranks of their experts -> experts -> outputs back      (two all-to-alls)

Of DeepSpeed this takes what has to agree with its ZeRO optimizer: process groups, and experts' parameters as groups
of their own, whose gradients are summed only over ranks that hold the same experts. Its own layers are not used:
`MoE` drops or pads tokens to a capacity, which lets a token's output depend on others, and `AutoEP` replaces modules by
its own and writes checkpoints of its own; here routing is ours and dropless, with split sizes as they come. A rank's
part of a parameter is a slice of the whole, drawn and saved as such, so checkpoints fit every number of ranks.

Facts about DeepSpeed 0.19 that this rests on, each held by a test: it divides experts' gradients by the number of all
ranks, so they are scaled as all others; it sums squares of gradients over all ranks, each of which owns other pieces,
so the norm is exact (its mean over replicas changes nothing); it looks for expert groups where a module is a `MoE`.

Beside pretrain/engine_deepspeed.py the only file that imports deepspeed, when an engine asks for it.

Shapes: A rows sorted by expert, D width, R ranks that share experts, L experts of a rank, E = R L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from pretrain.config import check_expert_ranks
from pretrain.ops.experts import Experts, experts_of_rows, permuted, sorting
from pretrain.parallel import Group, Ranks, exchange_rows, sum_over_ranks


class Share(NamedTuple):
    """This rank's part of a parameter: from which element of the whole on, and the shape of the whole."""

    first: int
    shape: tuple[int, ...]


def shard_experts(model: nn.Module, size: int, ranks: Ranks) -> None:
    """Keep this rank's experts of every mixture. To be called before the model has memory.

    Raises ConfigError where `size` ranks cannot share the experts.
    """
    check_expert_ranks(size, ranks.world)
    mixtures = _mixtures(model)
    if not mixtures:
        raise ConfigError(
            f"engine.expert_parallel is {size}, but the model has no experts to deal to ranks; set it to 1, or"
            " model.channel to moe"
        )
    for _, experts in mixtures:
        if experts.count % size:
            raise ConfigError(
                f"engine.expert_parallel is {size}, which does not divide the {experts.count} experts of a layer; let"
                " it divide them, or set it to 1"
            )
        own = experts.count // size
        experts.keep(ranks.rank % size * own, (ranks.rank % size + 1) * own)


def expert_parameters(model: nn.Module) -> int:
    """Elements of all parameters that expert parallelism deals to ranks."""
    return sum(p.numel() for _, experts in _mixtures(model) for p in experts.parameters())


def shares_of(model: nn.Module) -> dict[str, Share]:
    """Of every parameter that this rank holds a part of, by name."""
    shares = {}
    for path, experts in _mixtures(model):
        for name, p in experts.named_parameters():
            if len(p) < experts.count:
                shares[f"{path}.{name}"] = Share(experts.first * p[0].numel(), (experts.count, *p.shape[1:]))
    return shares


def _mixtures(model: nn.Module) -> list[tuple[str, Experts]]:
    """Experts among which tokens choose, by path; one that reads every token is not dealt."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, Experts) and m.count > 1]


def join_groups(model: nn.Module, groups: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Connect the experts over ranks, and tell DeepSpeed of them; return its optimizer's groups.

    groups: as `optim.param_groups` gives them. To be called when all ranks have joined, before DeepSpeed's own set-up.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as known

    name = f"ep_size_{size}"
    if name not in known._get_expert_parallel_group_dict():
        known._create_expert_and_data_parallel(size)
    exchange = Exchange(known._get_expert_parallel_group(name), size)
    for _, experts in _mixtures(model):
        experts.exchange = exchange
    shares = shares_of(model)
    for full, p in model.named_parameters():
        if full in shares:
            p.allreduce, p.group_name = False, name  # type: ignore[attr-defined]

    class Sign(MoE):
        """Does nothing; a module of this class is how DeepSpeed knows that there are expert groups."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = size

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """The groups are there."""

    model.add_module("sign_of_experts", Sign())
    return [part for group in groups for part in _split(group, shares, name)]


def _split(group: dict[str, Any], shares: Iterable[str], name: str) -> list[dict[str, Any]]:
    """A group's parameters that all ranks have, and its experts'."""
    parts = []
    for of_experts, more in ((False, {}), (True, {"moe": True, "name": name})):
        both = [(n, p) for n, p in zip(group["names"], group["params"]) if (n in shares) == of_experts]
        if both:
            names, params = map(list, zip(*both))
            parts.append({**group, "names": names, "params": params, **more})
    return parts


def total_norm(grads: dict[str, Tensor], shares: Iterable[str], copies: int) -> Tensor:
    """The norm of all gradients, of which each of `copies` groups of ranks has those in `shares` once."""
    own = nn.utils.get_total_norm([grad for name, grad in grads.items() if name in shares])
    rest = nn.utils.get_total_norm([grad for name, grad in grads.items() if name not in shares])
    return (sum_over_ranks(own.double().square()) / copies + rest.double().square()).sqrt().float()


class Exchange:
    """Takes rows to the ranks that hold their experts, and the outputs back. `group`: the R ranks."""

    def __init__(self, group: Group, size: int) -> None:
        self._group, self._size = group, size

    def __call__(self, compute: Callable[[Tensor, Tensor], Tensor], rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        """(A, D) outputs. compute: of rows sorted by this rank's experts, and how many each has."""
        here_RL = counts_E.view(self._size, -1)
        there_RL = exchange_rows(here_RL, [1] * self._size, [1] * self._size, self._group)
        give, take = torch.stack((here_RL, there_RL)).sum(-1).tolist()
        arrived_AD = _Exchanged.apply(rows_AD, give, take, self._group)
        # they come rank by rank, and sorted within each
        owner_A = experts_of_rows(there_RL.flatten(), len(arrived_AD)) % there_RL.shape[1]
        order_A, inverse_A = sorting(owner_A)
        y_AD = compute(permuted(arrived_AD, order_A, inverse_A), there_RL.sum(0))
        return _Exchanged.apply(permuted(y_AD, inverse_A, order_A), take, give, self._group)


class _Exchanged(torch.autograd.Function):
    """Rows given to and taken from other ranks; the gradient goes the other way."""

    @staticmethod
    def forward(ctx, rows_AD: Tensor, give: Sequence[int], take: Sequence[int], group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.way = give, take, group
        return exchange_rows(rows_AD, give, take, group)

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        give, take, group = ctx.way
        return exchange_rows(grad_AD, take, give, group), None, None, None
