"""Losses of many heads at once, a chunk of tokens at a time, and the evidence that tokens give for modules.

Shapes: K models (two for each of M modules), N tokens, D width, V vocabulary, F width of the fusion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from data_pipeline.batch import IGNORE
from pretrain.layout import Layout
from pretrain.ops.loss import CHUNK_ELEMENTS


class Heads(NamedTuple):
    """weight_KVD, bias_KV: of each model's head. out_VF: of the fusion, where there is one."""

    weight_KVD: Tensor
    bias_KV: Tensor | None
    out_VF: Tensor | None


def module_logits(h_KND: Tensor, found_NF: Tensor | None, heads: Heads) -> Tensor:
    """(M, N, V): the mean of a module's two models' logits, and what fusion adds; one product for both models."""
    h_MND = h_KND.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) / 2
    weight_MVD = heads.weight_KVD.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
    logits_MNV = _exact(h_MND @ weight_MVD.transpose(1, 2))
    if heads.bias_KV is not None:
        logits_MNV = logits_MNV + heads.bias_KV.unflatten(0, (-1, 2)).mean(1)[:, None]
    if found_NF is not None and heads.out_VF is not None:
        logits_MNV = logits_MNV + F.linear(found_NF, heads.out_VF).to(logits_MNV.dtype)
    return logits_MNV


def model_logits(h_KND: Tensor, heads: Heads) -> Tensor:
    """(K, N, V): of each model by itself."""
    logits_KNV = h_KND @ heads.weight_KVD.transpose(1, 2)
    return _exact(logits_KNV if heads.bias_KV is None else logits_KNV + heads.bias_KV[:, None])


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def module_losses(
    h_KND: Tensor, found_NF: Tensor | None, heads: Heads, targets_N: Tensor, each: bool
) -> tuple[Tensor, Tensor | None]:
    """-log p[target] by module (M, N) and, if `each` is wanted, by model (K, N); 0 where the target is IGNORE.

    Logits exist a chunk of tokens at a time; where one chunk is not all, they are made again in the backward pass.
    """
    size = max(1, CHUNK_ELEMENTS // (heads.weight_KVD.shape[0] * heads.weight_KVD.shape[1]))
    spans = [slice(at, at + size) for at in range(0, len(targets_N), size)]
    again = len(spans) > 1 and torch.is_grad_enabled()
    by_module: list[Tensor] = []
    by_model: list[Tensor] = []
    for span in spans:
        found = None if found_NF is None else found_NF[span]
        inputs = (h_KND[:, span], found, heads, targets_N[span], each)
        loss, own = checkpoint(_losses, *inputs, use_reentrant=False) if again else _losses(*inputs)
        by_module.append(loss)
        by_model += [] if own is None else [own]
    return torch.cat(by_module, 1), torch.cat(by_model, 1) if each else None


def _losses(
    h_KND: Tensor, found_NF: Tensor | None, heads: Heads, targets_N: Tensor, each: bool
) -> tuple[Tensor, Tensor | None]:
    of_modules = _cross_entropy(module_logits(h_KND, found_NF, heads), targets_N)
    return of_modules, _cross_entropy(model_logits(h_KND, heads), targets_N) if each else None


def _cross_entropy(logits_MNV: Tensor, targets_N: Tensor) -> Tensor:
    counted_N = targets_N != IGNORE
    loss_MN = _NegativeLogLikelihood.apply(logits_MNV, torch.where(counted_N, targets_N, 0).unsqueeze(-1))
    return loss_MN.masked_fill(~counted_N, 0.0)


class _NegativeLogLikelihood(torch.autograd.Function):
    """-log softmax(z)[target]. torch's own goes three times over a matrix of (M, N, V) backwards; once is enough."""

    @staticmethod
    def forward(ctx: Any, logits_MNV: Tensor, at_N1: Tensor) -> Tensor:
        log_p_MNV, at_MN1 = logits_MNV.log_softmax(-1), at_N1.expand(len(logits_MNV), -1, 1)
        ctx.save_for_backward(log_p_MNV, at_MN1)
        return -log_p_MNV.gather(-1, at_MN1).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, None]:
        log_p_MNV, at_MN1 = ctx.saved_tensors
        grad_MN1 = grad_MN.unsqueeze(-1)
        return (log_p_MNV.exp().mul_(grad_MN1)).scatter_add_(-1, at_MN1, -grad_MN1), None


def evidence(told_MBT: Tensor, layout: Layout, before_MB: Tensor, memory: float) -> Tensor:
    """(M, B, T): log of what the tokens of a document so far say for each module, up to a constant.

    told_MBT: each module's loss of token t given those before it, 0 at a document's start. before_MB: the evidence at
    the last token of the stream. memory: share that is left a token later; 1 is the exact posterior.
    """
    evidence_MB, steps = before_MB, []
    begins_BT = layout.pos_BT == 0
    for t in range(told_MBT.shape[2]):
        evidence_MB = (memory * evidence_MB - told_MBT[:, :, t]).masked_fill(begins_BT[:, t], 0.0)
        steps.append(evidence_MB)
    return torch.stack(steps, dim=2)
