"""Losses of the heads of an ensemble, against the equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.batch import IGNORE
from pretrain.ensemble import losses
from pretrain.ensemble.losses import Heads, module_losses
from tests.contract.cases import noise

K, N, D, V = 4, 10, 6, 7


@pytest.mark.parametrize("elements", [1, K * V * 3, 1 << 20], ids=["token by token", "chunks", "at once"])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_of_modules_and_models_are_those_of_the_equation(bias, elements, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    targets[3], targets[7] = IGNORE, IGNORE
    inputs = [noise(K, N, D), noise(K, V, D, seed=1), noise(K, V, seed=2), noise(N, 5, seed=3), noise(V, 5, seed=4)]
    h, weight, head_bias, found, out = (x.requires_grad_() for x in inputs)
    heads = Heads(weight, head_bias if bias else None, out)
    ours = module_losses(h, found, heads, targets, each=True)
    own = h @ weight.transpose(1, 2) + (head_bias[:, None] if bias else 0.0)
    both = own.unflatten(0, (-1, 2)).mean(1) + found @ out.T
    for found_loss, logits in zip(ours, (both, own)):
        expected = torch.stack([F.cross_entropy(z, targets, ignore_index=IGNORE, reduction="none") for z in logits])
        torch.testing.assert_close(found_loss, expected, rtol=0, atol=1e-12)
        assert not found_loss[:, targets == IGNORE].any()
        weights = noise(*expected.shape, seed=5)
        grads = [
            torch.autograd.grad((loss * weights).sum(), [h, weight], retain_graph=True)
            for loss in (found_loss, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_loss_is_finite_for_huge_logits():
    h = torch.full((2, 3, 1), 1e4).requires_grad_()
    heads = Heads(torch.tensor([[[1.0], [-1.0]]] * 2), None, None)
    loss, _ = module_losses(h, None, heads, torch.tensor([0, 1, IGNORE]), each=False)
    loss.sum().backward()
    assert loss.tolist() == [[0.0, 2e4, 0.0]]
    assert torch.isfinite(h.grad).all()
