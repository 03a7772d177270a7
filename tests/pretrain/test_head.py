"""The head and the feed-forward over its logits beside their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import ConfigError
from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import IGNORE
from pretrain.config import EngineConfig, ModelConfig, OptimConfig
from pretrain.cost import cost_of
from pretrain.engine import TorchEngine
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.models.head import Head
from tests.contract.cases import VOCAB, noise, packed, shaken, tokens
from tests.contract.test_stacks import batch_of

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
WIDTH, HIDDEN, FEW, MANY = 8, 12, 2, 40
over_heads = pytest.mark.parametrize("keys", [{}, {"tie": False}, {"tie": False, "bias": True}], ids=str)
over_ranks = pytest.mark.parametrize("rank", [0, 3])
over_counts = pytest.mark.parametrize("count", [FEW, MANY])


def config_of(rank=0, hidden=HIDDEN, freeze=False, **keys):
    logits = {"hidden": hidden, "rank": rank, "freeze_backbone": freeze}
    return checked(ModelConfig, Layers({"width": WIDTH, "depth": 2, "length": 48, "logits": logits} | keys))


def head_of(rank=0, **keys):
    """A head with random parameters, and the table that it is given where it is tied."""
    config = config_of(rank, **keys)
    return shaken(Head(config, VOCAB)), noise(VOCAB, WIDTH, seed=8).requires_grad_() if config.tie else None


def model_of(**keys):
    model = build(config_of(**keys), VOCAB).to_empty(device="cpu")
    initialise(model, 0)
    return model


def by_its_equation(head, table, x):
    """z' = z + W2 swish(W1 z + b1) + b2, with z = W x + b."""
    feed, z = head.feed, F.linear(x, head.weight if table is None else table, head.bias)
    first = feed.up.weight if feed.down is None else feed.up.weight @ feed.down.weight
    inner = z @ first.T + feed.up.bias
    return z + (inner * torch.sigmoid(inner)) @ feed.out.weight.T + feed.out.bias


@over_heads
@over_ranks
@over_counts
def test_the_loss_equals_that_of_the_equation_in_values_and_gradients(keys, rank, count):
    head, table = head_of(rank, **keys)
    x, results = noise(count, WIDTH), []
    targets = torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(0))
    targets[::5] = IGNORE
    for fast in (True, False):
        leaf = x.clone().requires_grad_()
        if fast:
            total, loss_N = head(leaf, table, targets)
        else:
            logits = by_its_equation(head, table, leaf)
            loss_N = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
            total = loss_N.sum()
        leaves = [leaf, *head.parameters(), *([] if table is None else [table])]
        results.append([total, loss_N, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **CLOSE)
        assert torch.count_nonzero(a) > 0


@over_heads
@over_ranks
def test_logits_equal_the_equation_for_few_vectors_and_for_many(keys, rank):
    head, table = head_of(rank, **keys)
    for rows, length in ((1, FEW), (4, MANY)):
        x = noise(rows, length, WIDTH)
        torch.testing.assert_close(head.logits(x, table), by_its_equation(head, table, x), **CLOSE)


@over_ranks
@over_counts
def test_the_cheaper_order_is_taken_and_what_one_vector_costs_is_stated(rank, count):
    head, table = head_of(rank)
    with FlopCounterMode(display=False) as counter:
        head.logits(noise(1, count, WIDTH), table)
    inner = rank or HIDDEN
    once, by_logits = 2 * inner * VOCAB * WIDTH, 2 * VOCAB * (WIDTH + inner)
    each = head.flops_per_token()
    assert counter.get_total_flops() == min(once + count * each, count * (each - 2 * inner * WIDTH + by_logits))


@over_heads
def test_a_model_begins_as_its_backbone(keys):
    ids, layout, plain = tokens(), Layout.single(3, 48), model_of(hidden=0, **keys)
    for rank in (0, 3):
        model = model_of(rank=rank, **keys)
        assert torch.equal(model.logits(ids, layout), plain.logits(ids, layout))
        names = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
        assert all(name.startswith("head.feed.") for name in names)


def test_a_head_of_its_own_keeps_its_names():
    names = [name for name, _ in model_of(hidden=0, tie=False, bias=True, norm="layernorm").named_parameters()]
    assert [name for name in names if name.startswith("head")] == ["head.weight", "head.bias"]
    assert not [name for name, _ in model_of(hidden=0).named_parameters() if name.startswith("head")]


def test_no_logits_are_kept():
    """With 256 tokens and 4,096 symbols, nothing is as large as tokens times symbols."""
    config = config_of(hidden=16)
    head = Head(config, 4096)
    initialise(head, 0)
    table, x = torch.randn(4096, WIDTH, requires_grad=True), torch.randn(256, WIDTH, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head(x, table, torch.zeros(256, dtype=torch.long))
    assert max(kept) == 4096 * (WIDTH + 16)


def test_the_published_size_has_82_million_parameters():
    """5,000 symbols and 8,192 hidden; the source's history speaks of a model of about 80 million."""
    feed = build(config_of(hidden=8192), 5000).head.feed
    assert sum(p.numel() for p in feed.parameters()) == 2 * 5000 * 8192 + 13_192 == 81_933_192
    low = build(config_of(hidden=8192, rank=64), 5000).head.feed
    assert sum(p.numel() for p in low.parameters()) == 64 * (5000 + 8192) + 5000 * 8192 + 13_192


def test_a_models_cost_counts_the_feed_forward():
    more = cost_of(model_of()).flops_per_token - cost_of(model_of(hidden=0)).flops_per_token
    assert more == 3 * 2 * HIDDEN * (WIDTH + VOCAB)


@over_ranks
def test_decoding_goes_the_other_way_and_gives_the_same_logits(rank):
    model = shaken(build(config_of(rank), VOCAB).to_empty(device="cpu"))
    ids, state, steps = tokens(), model.initial_state(3), []
    for t in range(48):
        logits, state = model.decode(ids[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model.logits(ids, Layout.single(3, 48)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("keys", [{}, {"tie": False, "dropout": 0.1, "wrap": {"passes": 2, "loss": "mean_all"}}])
def test_a_frozen_backbone_stays_as_it_is_and_the_feed_forward_learns(keys, precision):
    model = model_of(freeze=True, **keys)
    config = EngineConfig(name="torch", precision=precision)
    engine = TorchEngine(model, OptimConfig(lr=1e-2), config, sources=1, seed=0, device=torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [engine.step([batch_of(packed())], step, 1.0).loss for step in range(8)]
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("head.feed."), name
    for fragment in engine.state().fragments:
        assert fragment.kind == "param" or fragment.name.startswith("head.feed.")


@pytest.mark.parametrize("keys", [{"rank": 4}, {"freeze_backbone": True}])
def test_options_of_a_feed_forward_that_is_not_there_are_a_mistake(keys):
    with pytest.raises(ConfigError, match=r"no feed-forward; set model\.logits\.hidden"):
        checked(ModelConfig, Layers({"logits": keys}))
