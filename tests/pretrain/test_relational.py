"""The relational transformer against its equation over pairs, which the stack never writes out."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from configs.load import Layers
from configs.load import build as checked
from pretrain import stack
from pretrain.config import ModelConfig
from tests.contract.cases import noise, packed, shaken

B, T, D, C, HEADS = 2, 9, 16, 6, 2
over_cuts = pytest.mark.parametrize("cuts", [(), (1, 5)])


def config_of(name="relational", depth=2, positions="rope", **options):
    part = {"name": name, "options": options}
    mixer = {"name": "attention", "options": {"heads": HEADS}}
    keys = {"width": D, "depth": depth, "length": T, "positions": positions, "stack": part, "mixers": [mixer]}
    return checked(ModelConfig, Layers(keys))


def relational(depth=2, positions="rope", seed=0):
    """The stack in float64 with random parameters, none of them zero."""
    config = config_of(depth=depth, positions=positions, heads=HEADS, edge_width=C)
    return shaken(stack.make(config), seed)


def layout_of(cuts=(1, 5)):
    return packed(rows=B, length=T, cuts=cuts)


@over_cuts
def test_attention_is_that_of_queries_keys_and_values_of_pairs(cuts):
    model, layout, x = relational(positions="none"), layout_of(cuts), noise(B, T, D)
    nodes = model.layers[0].nodes
    e, rows, _ = model.start(noise(B, T, D, seed=5), layout, None)
    q, k, v = nodes.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).unbind(2)
    n = nodes.norm(e)
    q_pair, k_pair, v_pair = (
        of_token + torch.einsum("hec,btsc->btshe", of_edge, n)
        for of_token, of_edge in (
            (q[:, :, None], nodes.edge_q),
            (k[:, None], nodes.edge_k),
            (v[:, None], nodes.edge_v),
        )
    )
    scores = (q_pair * k_pair).sum(-1) / (D // HEADS) ** 0.5
    weights = scores.masked_fill(~layout.mask()[:, 0, :, :, None], -torch.inf).softmax(2)
    expected = nodes.out((weights[..., None] * v_pair).sum(2).flatten(2))
    y, told, state = nodes(x, e, rows, None)
    assert (told, state) == (None, None)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_edges_learn_from_both_tokens_and_from_themselves():
    model, layout, x = relational(), layout_of(), noise(B, T, D)
    update = model.layers[0].update
    e, rows, _ = model.start(x, layout, None)
    u, weight = update.norm(x), torch.cat([part.weight for part in (update.row, update.column, update.edge)], dim=1)
    every = torch.cat((u[:, :, None].expand(-1, -1, T, -1), u[:, None].expand(-1, T, -1, -1), update.edge_norm(e)), -1)
    after, _ = update(e, x, None, rows, None)
    torch.testing.assert_close(after, e + every @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["rope", "none"])
@over_cuts
def test_without_edges_it_is_attention(cuts, positions):
    model, blocks = relational(positions=positions), shaken(stack.make(config_of("blocks", positions=positions)))
    for layer, block in zip(model.layers, blocks):
        for name in ("edge_q", "edge_k", "edge_v"):
            torch.nn.init.zeros_(getattr(layer.nodes, name))
        for mine, its in (("nodes.qkv", "mixer.qkv"), ("nodes.out", "mixer.out"), ("channel", "channel")):
            layer.get_submodule(mine).load_state_dict(block.get_submodule(its).state_dict())
        for norm in ("norm1", "norm2"):
            layer.get_submodule(norm).load_state_dict(block.get_submodule(norm).state_dict())
    x, layout = noise(B, T, D), layout_of(cuts)
    torch.testing.assert_close(model(x, layout).x_BTD, blocks(x, layout).x_BTD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_parameter_is_dead_and_the_last_layer_updates_no_edges(depth):
    model, x = relational(depth), noise(B, T, D)
    model(x, layout_of()).x_BTD.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0] == []
    assert [layer.update is None for layer in model.layers] == [False] * (depth - 1) + [True]


def test_members_of_an_ensemble_may_be_relational():
    """Under torch.func.vmap over parameters and inputs it computes what a loop over them does."""
    members, x, layout = [relational(seed=seed) for seed in (0, 5)], noise(2, B, T, D), layout_of()
    together = vmap(lambda p, b, x_BTD: functional_call(members[0], (p, b), (x_BTD, layout)).x_BTD)(
        *stack_module_state(members), x
    )
    for member, value, got in zip(members, x, together):
        torch.testing.assert_close(got, member(value, layout).x_BTD, rtol=0, atol=1e-12)
