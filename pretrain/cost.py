"""What a model costs: parameters, operations, bytes, and how much of a device's peak a run uses."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.config import EngineConfig
from pretrain.members import MemberTables
from pretrain.model import Model

# dense bf16 and fp32 (TF32 off) peaks as the makers state them, in TFLOP/s; of two names that fit, the first holds
_PEAKS = {
    "GH200": (989.0, 67.0),
    "H200 NVL": (835.0, 60.0),
    "H200": (989.0, 67.0),
    "H100 NVL": (835.0, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "RTX 4090": (165.2, 82.6),
}


@dataclass(frozen=True)
class Cost:
    """Of one model. flops_per_token: of training (three forward passes), recomputation not counted."""

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    state_bytes: int


def cost_of(model: Model) -> Cost:
    """The cost of a model; it may be on the meta device."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | MemberTables)]
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=sum(p.numel() for table in tables for p in table.parameters()),
        flops_per_token=3 * model.flops_per_token(),
        state_bytes=model.state_bytes(model.length),
    )


def training_bytes(parameters: int, config: EngineConfig, world: int, of_experts: int = 0) -> int:
    """Bytes of parameters, gradients, masters and moments on one rank; activations come on top.

    of_experts: of the parameters, those that `engine.expert_parallel` ranks share.
    """
    low = 2 if config.precision == "bf16" else 4
    shared = 1 if config.name == "torch" else world
    whole = parameters - of_experts + of_experts / config.expert_parallel
    # where ranks share experts, fewer of them hold the same ones: a piece of them is as small as of all else
    piece = parameters / shared
    weights = low * (piece if config.zero == 3 else whole)
    grads = low * (piece if config.zero >= 2 else whole)
    moments = 12 * (piece if config.zero >= 1 else whole)
    if config.precision == "fp32" and (config.zero == 0 or config.name == "torch"):
        # the weights are their own masters
        moments -= 4 * whole
    return int(weights + grads + (0 if config.offload_optimizer else moments))


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations a second that one device can reach: the maker's figure for known GPUs, else measured in 0.2 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peaks for key, peaks in _PEAKS.items() if re.search(rf"\b{key}\b(?! Laptop)", name)), None)
        if known is not None:
            return 1e12 * known[0 if precision == "bf16" else 1]
    return measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product seen within `seconds`."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
