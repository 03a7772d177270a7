"""How parameters begin: each says it where it is made, and draws from a generator named by itself.

A parameter's first values depend on the seed and its name alone, so they are the same for every rank, sharding and
order of construction. Models are built on the meta device, given memory, then filled here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.groups import without_groups
from pretrain.ops.mapped import at_once, is_mapped, of_all_members
from pretrain.parallel import derive_seed

Fill = Callable[[Tensor, torch.Generator], Tensor]
SomeModel = TypeVar("SomeModel", bound=nn.Module)


def normal(std: float) -> Fill:
    """Independent normal values of mean 0."""
    return lambda tensor, generator: tensor.copy_(_fp32(tensor).normal_(generator=generator)).mul_(std)


def uniform(limit: float) -> Fill:
    """Independent values, uniform from -limit to limit."""
    return lambda tensor, generator: tensor.copy_(_fp32(tensor).uniform_(-limit, limit, generator=generator))


def constant(value: float) -> Fill:
    """The same value everywhere."""
    return lambda tensor, generator: tensor.fill_(value)


def values(make: Callable[[], Tensor]) -> Fill:
    """What `make` returns, copied; it is called when the parameter is filled, not when it is declared."""
    return lambda tensor, generator: tensor.copy_(make())


def declare(module: nn.Module, fills: Mapping[str, Fill]) -> None:
    """Say how a module's own parameters begin."""
    module.fills = dict(fills)  # type: ignore[assignment]


class Linear(nn.Linear):
    """torch's linear layer; under torch.func.vmap its rows are one matrix, since the rule for three dimensions would
    multiply, and sum gradients, row by row."""

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        if at_once(*tensors):
            return of_all_members(_linear_of_members, *tensors)
        if x.ndim > 2 and is_mapped(self.weight):
            return F.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight, self.bias)


def _linear_of_members(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, ..., I), weight (M, O, I), bias (M, O): one product for each member."""
    rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    y = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.view(*x.shape[:-1], -1)


def linear(fan_in: int, fan_out: int, *, bias: bool = False) -> nn.Linear:
    """A linear layer that keeps the size of its input: normal weights of std 1/sqrt(fan_in), a zero bias if any.

    At a width of 2,500 that is GPT-2's 0.02; narrower models need larger weights and learn much faster with them.
    """
    return _linear(fan_in, fan_out, bias, normal(fan_in**-0.5))


def residual(fan_in: int, fan_out: int, depth: int, *, bias: bool = False) -> nn.Linear:
    """A linear layer that ends a residual branch of a model of `depth` blocks, with a `residual_weight`."""
    return _linear(fan_in, fan_out, bias, residual_weight(fan_in, depth))


def residual_weight(fan_in: int, depth: int) -> Fill:
    """The weight that ends a residual branch of a model of `depth` blocks: all branches together begin at a quarter of
    the size of a linear layer's output, so that at first each token is mostly itself.

    A full size hides the token from later blocks and costs 0.02 nats (docs/BENCHMARKS.md); zero would let a tied head
    begin by repeating each token with a logit of sqrt(width).
    """
    return normal(0.25 / (2 * depth * fan_in) ** 0.5)


def embedding(count: int, width: int) -> nn.Embedding:
    """A table of normal vectors of length about 1, so that a tied head begins with logits of size 1."""
    # given its memory, it draws nothing: drawing on the meta device imports torch's compiler
    table = nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)
    declare(table, {"weight": normal(width**-0.5)})
    return table


def _linear(fan_in: int, fan_out: int, bias: bool, weight: Fill) -> nn.Linear:
    layer = Linear(fan_in, fan_out, bias=bias)
    declare(layer, {"weight": weight} | ({"bias": constant(0.0)} if bias else {}))
    return layer


def materialise(model: SomeModel, device: torch.device | str) -> SomeModel:
    """Give a model that is on the meta device memory on `device`, in place, and return it. What is there is not set.

    As `to_empty`, which imports sympy for a look at each tensor's strides: half a second of every rank's start.
    """
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer as declared. Raises TypeError for one that nobody declared."""
    plain = without_groups(model)
    for name, tensor, fill in _declared(model):
        fill(tensor, _generator(seed, plain(name)))


@torch.no_grad()
def first_values(model: nn.Module, seed: int, names: Collection[str]) -> dict[str, Tensor]:
    """What `initialise` fills some parameters and buffers with, on the CPU; the model may be without memory."""
    plain = without_groups(model)
    return {
        name: fill(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), _generator(seed, plain(name)))
        for name, tensor, fill in _declared(model)
        if name in names
    }


def _declared(model: nn.Module) -> Iterator[tuple[str, Tensor, Fill]]:
    for path, module in model.named_modules():
        fills = getattr(module, "fills", {})
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            if name not in fills:
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                raise TypeError(f"nobody says how the {kind} {full} begins; declare it where it is made")
            yield full, tensor, fills[name]


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "init", name))


def _fp32(tensor: Tensor) -> Tensor:
    """Room of the same shape on the CPU in fp32: what is drawn there does not depend on device or precision."""
    return torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
