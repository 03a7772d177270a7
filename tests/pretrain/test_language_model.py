"""The model around the mixers: shapes, counts, losses, hybrids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.errors import UsageError
from configs.load import find, load
from data_pipeline.batch import IGNORE, collate
from pretrain.config import ModelConfig, PartConfig, RunConfig
from pretrain.cost import cost_of
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build


def small(**keys):
    model = build(ModelConfig(**{"width": 16, "depth": 2, "length": 24, **keys}), 50).to_empty(device="cpu")
    initialise(model, 0)
    return model


def batch_of(rows=3, length=24, vocab=50):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length + 1))
    boundaries = [np.array([5, 9, length]), np.array([], dtype=np.int64), np.array([1])]
    return collate(tokens, boundaries, np.array([0, 1, 0]))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_counted_targets(tie, bias):
    model, batch = small(tie=tie, bias=bias, norm="layernorm"), batch_of()
    logits = model.logits(batch.tokens_BT, Layout(batch.doc_BT, batch.pos_BT, False))
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
    total, loss_BT, _ = model(batch)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(loss_BT.sum(), expected)
    assert (loss_BT[batch.targets_BT == IGNORE] == 0).all()
    assert batch.count == int((batch.targets_BT != IGNORE).sum())


def test_first_values_depend_on_the_seed_and_the_name_alone():
    a, b, other = small(), small(depth=4), small()
    initialise(other, 1)
    for name, p in a.named_parameters():
        if p.ndim > 1 and "out" not in name and "down" not in name:
            assert torch.equal(p, dict(b.named_parameters())[name])
    assert not torch.equal(a.embed.weight, other.embed.weight)


def test_a_parameter_that_nobody_declared_is_told():
    model = small()
    model.blocks[0].norm1.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match=r"blocks\.0\.norm1\.extra"):
        initialise(model, 0)


def test_mixers_are_tiled_over_the_depth():
    model = small(depth=5, mixers=(PartConfig(name="attention"), PartConfig(name="correlation")))
    names = [type(block.mixer).__name__ for block in model.blocks]
    assert names == ["Attention", "Correlation", "Attention", "Correlation", "Attention"]


def test_recomputing_activations_changes_no_gradient():
    batch, grads = batch_of(), []
    for recompute in (False, True):
        model = small()
        if recompute:
            model.recompute()
        model(batch).total.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_dropout_is_a_function_of_the_step_and_off_in_evaluation():
    from pretrain.parallel import seed_step

    model, batch = small(dropout=0.3), batch_of()
    losses = []
    for step in (1, 1, 2):
        seed_step(0, step, 0)
        losses.append(model(batch).total.item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert model(batch).total.item() == model(batch).total.item()


def test_learned_positions_end_with_one_sentence():
    model = small(positions="learned")
    state = model.initial_state(1)
    _, state = model.decode(torch.zeros(1, 24, dtype=torch.long), state)
    with pytest.raises(UsageError, match="learned positions for 24 tokens"):
        model.decode(torch.zeros(1, 1, dtype=torch.long), state)


def test_costs_are_told_without_memory():
    cost = cost_of(build(load(RunConfig, [find("models/leviathan-1b")]).model, 32_000))
    assert 1.0e9 < cost.parameters < 1.2e9
    assert cost.flops_per_token > 6 * (cost.parameters - cost.embedding_parameters)
