"""Functions between the two layers of a channel mixer, by the names that configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "leaky_relu": F.leaky_relu}
