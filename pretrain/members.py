"""Equal modules with parameters of their own, run as one: weights stacked, products batched.

Eight small models in eight Python loops leave a processor idle between small products. Here each parameter of one
module gets a first dimension M, and torch.func.vmap runs the module over it. That is a layout of the run only:
checkpoints name each member's own parameters (pretrain/member_names.py).

Shapes: M members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from configs.errors import ConfigError
from pretrain.init import Fill, declare
from pretrain.parallel import derive_seed


class Members(nn.Module):
    """One module for each of `names`. Tensors given to it and taken from it have a first dimension M.

    make: builds the module of one member; called once, its parameters are never filled.
    """

    def __init__(self, make: Callable[[], nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        with torch.device("meta"):
            template = make()
        if any(True for _ in template.buffers()):
            raise ConfigError(
                "a part of an ensemble's models keeps counts beside its parameters, and models run as one have no room"
                " for them; choose options without (of moe: balance: loss)"
            )
        self.names = list(names)
        # in a tuple it is no submodule: its parameters are shapes and names only
        self._template = (template,)
        self._places: list[tuple[nn.Module, str]] = []
        fills = {}
        for path, module in template.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._places.append((module, name))
                own = f"{path}.{name}".strip(".").replace(".", "/")
                size = (len(names), *parameter.shape)
                self.register_parameter(own, nn.Parameter(torch.empty(size), requires_grad=parameter.requires_grad))
                fills[own] = self._fill(getattr(module, "fills", {})[name])
        self._shapes = [module._parameters[name] for module, name in self._places]
        declare(self, fills)

    @property
    def template(self) -> Any:
        """The module of one member, without values."""
        return self._template[0]

    def forward(self, *inputs: Any) -> Any:
        """inputs: tensors, or trees of them, of all members; anything else is given to each as it is."""
        given, like_inputs = _tensors_of(inputs)
        own: list[Any] = list(self._parameters.values())
        like_outputs: list[Callable[[Sequence[Tensor]], Any]] = []

        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self._lent(tensors[: len(own)]):
                outputs, like = _tensors_of(self.template(*like_inputs(tensors[len(own) :])))
            like_outputs.append(like)
            return tuple(outputs)

        outputs = vmap(one, randomness="different")(*own, *given)
        return like_outputs[0](outputs)

    @contextmanager
    def _lent(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """The template with one member's parameters."""
        for (module, name), parameter in zip(self._places, parameters):
            module._parameters[name] = parameter  # type: ignore[assignment]
        try:
            yield
        finally:
            for (module, name), shape in zip(self._places, self._shapes):
                module._parameters[name] = shape

    def stacked(self) -> dict[str, Tensor]:
        """The stacked parameters by their names in the template."""
        return {name.replace("/", "."): p for name, p in self.named_parameters(recurse=False)}

    def train(self, mode: bool = True) -> Members:
        """As of any module; the template is told too."""
        self.template.train(mode)
        return super().train(mode)

    def _fill(self, fill: Fill) -> Fill:
        """Each member's values are drawn for its name, whatever other members there are."""

        def every(tensor: Tensor, generator: torch.Generator) -> Tensor:
            seed = generator.initial_seed()
            for name, part in zip(self.names, tensor):
                fill(part, torch.Generator().manual_seed(derive_seed(seed, name)))
            return tensor

        return every


class MemberTables(Members):
    """Embeddings: a table for each member, read by the same ids."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(M, B, T, D): rows of each member's table."""
        table_MVD = self.stacked()["weight"]
        members, vocab, width = table_MVD.shape
        first_M = vocab * torch.arange(members, device=ids_BT.device)
        return F.embedding(ids_BT + first_M.view(-1, 1, 1), table_MVD.reshape(members * vocab, width))


def _tensors_of(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in a tree, and what makes such a tree of others in their places."""
    leaves, spec = tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if torch.is_tensor(leaf)]

    def like(tensors: Sequence[Tensor]) -> Any:
        others = list(leaves)
        for place, tensor in zip(places, tensors):
            others[place] = tensor
        return tree_unflatten(others, spec)

    return [leaves[place] for place in places], like


def members_of(model: nn.Module) -> list[tuple[str, Members]]:
    """Every place in a model where members are run as one, by its path."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Members)]
