"""Ranks: who this process is among them, what they agree on, and seeds that need no memory.

The only file that imports torch.distributed.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = dist.ProcessGroup
"""Some of the ranks."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, its number on this host, the host's name."""

    rank: int
    world: int
    local_rank: int
    host: str

    @classmethod
    def from_environment(cls) -> Ranks:
        """What the launcher set: RANK, WORLD_SIZE, LOCAL_RANK; one rank where it set nothing."""
        return cls(
            int(os.environ.get("RANK", 0)),
            int(os.environ.get("WORLD_SIZE", 1)),
            int(os.environ.get("LOCAL_RANK", 0)),
            socket.gethostname(),
        )

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose: a pure function, so that no generator's state is ever saved."""
    text = "|".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's own generators for what is random within one step of one rank (dropout)."""
    value = derive_seed(seed, "step", step, rank)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


def join(backend: str, timeout_s: float) -> None:
    """Form the process group that the launcher's environment describes; a group of one where it describes none.

    Ranks meet at rank 0's own address, under the nonce of this attempt: whoever else connects there, by accident or
    not, is never counted as a rank and reads or writes none of their keys. A process joins once, whatever it builds.
    """
    if dist.is_initialized():
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 0))
    timeout, listening = timedelta(seconds=timeout_s), None
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # by ourselves, since the store would listen at every address of this host
        with socket.create_server((host, port), family=family, backlog=2048) as server:
            port, listening = server.getsockname()[1], server.detach()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=listening
    )
    prefix = dist.PrefixStore(  # type: ignore[attr-defined]
        os.environ.get("LEVIATHAN_NONCE", ""), store
    )
    dist.init_process_group(backend, store=prefix, rank=rank, world_size=world, timeout=timeout)


def alone() -> bool:
    """Whether there is no other rank to ask."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` summed over all ranks; untouched where there is one rank."""
    return _reduce(values, dist.ReduceOp.SUM)


def min_over_ranks(values: Tensor) -> Tensor:
    """The least of each of `values` over all ranks."""
    return _reduce(values, dist.ReduceOp.MIN)


def _reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if alone():
        return values
    # NCCL knows no host memory
    shared = values.cuda() if _on_cuda() and not values.is_cuda else values
    dist.all_reduce(shared, op=operation)
    return shared


def exchange_rows(rows: Tensor, give: Sequence[int], take: Sequence[int], group: Group) -> Tensor:
    """Among the ranks of `group`: give the first give[0] rows to the first, and so on; take[r] rows come from rank r.

    rows: (A, ...), any number of them, none too. Returns them in the order of the ranks they are from.
    """
    taken = rows.new_empty(sum(take), *rows.shape[1:])
    dist.all_to_all_single(taken, rows.contiguous(), list(take), list(give), group=group)
    return taken


def same_on_all_ranks(numbers: list[int]) -> list[int]:
    """Rank 0's list of whole numbers, on every rank."""
    if alone():
        return numbers
    device = "cuda" if _on_cuda() else "cpu"
    count = torch.tensor([len(numbers)], device=device)
    dist.broadcast(count, src=0)
    values = torch.zeros(int(count.item()), dtype=torch.long, device=device)
    if dist.get_rank() == 0:
        values.copy_(torch.tensor(numbers, dtype=torch.long))
    if len(values):
        dist.broadcast(values, src=0)
    return values.tolist()


def finish() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1, device="cuda" if _on_cuda() else "cpu"))


def _on_cuda() -> bool:
    return dist.is_initialized() and dist.get_backend() == "nccl"
