"""Operations on what torch.func.vmap maps over members: of all members by one call, outside of the map.

Inside of a map torch follows every operation by a rule of its own. That costs more than a small operation itself, and
what has no rule is run member by member. Whoever can do an operation for all members at once calls it here.

Shapes: M members, first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

_functorch = torch._C._functorch


def is_mapped(*tensors: Tensor) -> bool:
    """Whether any of them is one member's, as torch.func.vmap shows it."""
    return any(map(_functorch.is_batchedtensor, tensors))


def is_plain() -> bool:
    """Whether no transform of torch.func is at work, and torch.compile does not look on."""
    return not torch.compiler.is_compiling() and _functorch.get_dynamic_layer_stack_depth() == 0


def at_once(*tensors: Tensor) -> bool:
    """Whether `of_all_members` can be called: one is mapped, and by no more than one transform of torch.func.

    Never while torch.compile looks on: it can follow maps, not leave them, and merges operations itself.
    """
    if torch.compiler.is_compiling():
        return False
    return is_mapped(*tensors) and _functorch.get_dynamic_layer_stack_depth() == 1


def of_all_members(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What `function` makes of (M, ...) each, shown as one member's again; it may be differentiated as ever.

    tensors: where `at_once` is true of them. One that is not mapped is given as a view, the same for every member.
    """
    level = max(map(_functorch.maybe_get_level, tensors))
    mapped = [_all(x) if is_mapped(x) else None for x in tensors]
    members = next(len(x) for x in mapped if x is not None)
    whole = [x.expand(members, *x.shape) if each is None else each for x, each in zip(tensors, mapped)]
    with temporarily_pop_interpreter_stack():
        y = function(*whole)
    return _functorch._add_batch_dim(y, 0, level)


def _all(x: Tensor) -> Tensor:
    whole, at = _functorch.get_unwrapped(x), _functorch.maybe_get_bdim(x)
    return whole if at == 0 else whole.movedim(at, 0)
