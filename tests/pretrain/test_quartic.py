"""The quartic transformer: every edge mixer against its equation, the choice of edges, and causality of all of them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap

from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import Batch
from pretrain import stack
from pretrain.config import ModelConfig
from pretrain.edges.linear import ColumnMixer, PrefixMixer, RowMixer
from pretrain.edges.mixer import EdgeSizes
from pretrain.edges.routed import DiagonalMixer, TopMixer
from pretrain.edges.start import EdgeStart, Rows
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.ops.routing import coordinate_descent
from pretrain.ops.taylor import features, taylor_naive, taylor_scan, with_one
from tests.contract.cases import noise, packed, piece, shaken

B, T, D, C, HEADS, WIDTH = 2, 9, 16, 6, 2, 3
MIXERS = ("row", "col", "prefix", "top", "diagonal")
CUTS = (2, 3, 7)
SUBSETS = [subset for size in range(len(MIXERS) + 1) for subset in combinations(MIXERS, size)]


def config_of(depth=3, **options):
    options = {"heads": 2, "edge_width": C, "edge_head_width": WIDTH, "routed": 2, "iterations": 9} | options
    part = {"name": "quartic", "options": options}
    return checked(ModelConfig, Layers({"width": D, "depth": depth, "length": T, "stack": part}))


def quartic(depth=3, **options):
    """The stack in float64 with random parameters, none of them zero."""
    return shaken(stack.make(config_of(depth, **options)))


def edge_mixer(kind, routed=2, iterations=9):
    return shaken(kind(EdgeSizes(C, HEADS, WIDTH, routed, iterations), config_of()))


def layout_of(cuts=(1, 5)):
    return packed(rows=B, length=T, cuts=cuts)


def flattened(mix, layout, sees_edge):
    """An edge mixer by its equation: Taylor weights among the list of edges that there are, one row at a time.

    sees_edge(i, j, i', j'): whether edge (i, j) looks at (i', j').
    """
    e, out = noise(B, T, T, C), torch.zeros(B, T, T, C, dtype=torch.float64)
    q, k, v, g = mix.project(e)
    for b in range(B):
        there = torch.nonzero(layout.mask()[b, 0]).tolist()
        for i, j in there:
            keys = [(a, c) for a, c in there if layout.doc_BT[b, a] == layout.doc_BT[b, i] and sees_edge(i, j, a, c)]
            s = torch.stack([(q[b, i, j] * k[b, a, c]).sum(-1) for a, c in keys])
            weight = 1 + s + s**2 / 2
            y = sum(weight[n, :, None] * v[b, a, c] for n, (a, c) in enumerate(keys)) / weight.sum(0)[:, None]
            out[b, i, j] = mix.finish(y, g[b, i, j])
    return e, out


@pytest.mark.parametrize(
    ("kind", "sees_edge"),
    [
        (RowMixer, lambda i, j, a, c: a == i),
        (ColumnMixer, lambda i, j, a, c: c == j and a <= i),
        (PrefixMixer, lambda i, j, a, c: a <= i),
    ],
)
@pytest.mark.parametrize("cuts", [(), (1, 5)])
def test_a_linear_mixer_is_taylor_attention_over_the_list_of_edges_it_sees(kind, sees_edge, cuts):
    mix, layout = edge_mixer(kind), layout_of(cuts)
    e, expected = flattened(mix, layout, sees_edge)
    y, state = mix(e, noise(B, T, T), Rows(layout, layout.mask()[:, 0]), None)
    there = layout.mask()[:, 0]
    assert state is None
    torch.testing.assert_close(y[there], expected[there], rtol=0, atol=1e-12)


def test_with_one_token_an_edge_finds_itself():
    for kind in (RowMixer, ColumnMixer, PrefixMixer, DiagonalMixer, TopMixer):
        mix, layout, e = edge_mixer(kind, iterations=60), Layout.single(B, 1), noise(B, 1, 1, C)
        y, _ = mix(e, noise(B, 1, 1), Rows(layout, layout.mask()[:, 0]), None)
        _, _, v, g = mix.project(e)
        torch.testing.assert_close(y, mix.finish(v, g), rtol=0, atol=1e-12)


def softmax_over(mix, e, keys_of):
    """Softmax attention of the edges named by `keys_of`, {edge: edges it sees}, in row 0 of a batch; 0 for others."""
    q, k, v, g = mix.project(e)
    out = torch.zeros_like(e)
    for (i, j), keys in keys_of.items():
        s = torch.stack([(q[0, i, j] * k[0, a, c]).sum(-1) for a, c in keys]) / WIDTH**0.5
        y = sum(s.softmax(0)[n, :, None] * v[0, a, c] for n, (a, c) in enumerate(keys))
        out[0, i, j] = mix.finish(y, g[0, i, j])
    return out


def test_the_diagonal_mixer_is_causal_softmax_attention_among_edges_of_tokens_with_themselves():
    mix, layout, e = edge_mixer(DiagonalMixer), Layout.single(1, T), noise(1, T, T, C)
    y, _ = mix(e, noise(1, T, T), Rows(layout, layout.mask()[:, 0]), None)
    expected = softmax_over(mix, e, {(i, i): [(a, a) for a in range(i + 1)] for i in range(T)})
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("routed", [2, T])
def test_the_top_mixer_is_softmax_attention_among_the_chosen_edges_of_rows_so_far_times_their_gates(routed):
    mix, layout, e, scores = edge_mixer(TopMixer, routed), Layout.single(1, T), noise(1, T, T, C), noise(1, T, T)
    sees = layout.mask()[:, 0]
    y, _ = mix(e, scores, Rows(layout, sees), None)
    chosen = [(i, j) for i in range(T) for j in scores[0, i, : i + 1].topk(min(routed, i + 1)).indices.tolist()]
    gates = coordinate_descent(scores, sees, 9 / 8 * routed, 9)
    expected = softmax_over(mix, e, {(i, j): [(a, c) for a, c in chosen if a <= i] for i, j in chosen})
    torch.testing.assert_close(y, expected * gates[..., None], rtol=0, atol=1e-12)
    assert torch.count_nonzero(y.abs().sum(-1)) == len(chosen)


def test_gates_are_at_most_one_and_sum_to_how_many_are_chosen():
    s, there = noise(5, 40), torch.ones(5, 40, dtype=torch.bool)
    gates = coordinate_descent(s, there, 8, 50)
    assert gates.max() <= 1
    torch.testing.assert_close(gates.sum(-1), torch.full((5,), 8.0, dtype=torch.float64), rtol=0, atol=5e-3)
    # in the order of the scores
    assert (gates.gather(1, s.argsort(dim=1)).diff(dim=1) >= 0).all()


def test_gates_of_widely_spread_scores_are_still_nearly_those_of_the_largest():
    """Scores 100 times eps apart: without taking them relative to the k-th, 20 passes leave dozens of gates at 1."""
    gates = coordinate_descent(10 * noise(5, 200), torch.ones(5, 200, dtype=torch.bool), 8, 20)
    assert ((gates.sum(-1) > 6.5) & (gates.sum(-1) < 8.01)).all()


def test_who_is_no_candidate_changes_no_gate_and_few_candidates_are_all_chosen():
    s, there = noise(1, 12), torch.arange(12) < torch.tensor([[7]])
    gates = coordinate_descent(s, there, 4, 20)
    other = coordinate_descent(s.masked_fill(~there, 50.0), there, 4, 20)
    assert torch.equal(gates, other)
    assert torch.count_nonzero(gates[:, 7:]) == 0
    torch.testing.assert_close(coordinate_descent(s[:, :7], there[:, :7], 4, 20), gates[:, :7], rtol=0, atol=1e-15)
    assert torch.equal(coordinate_descent(s, there, 9, 20), there.double())
    s = (0.02 * s).requires_grad_()  # so near to each other that no gate is at 1
    coordinate_descent(s, there, 4, 20)[0, :3].sum().backward()
    assert torch.isfinite(s.grad).all()
    assert torch.count_nonzero(s.grad[:, :7]) == 7
    assert torch.count_nonzero(s.grad[:, 7:]) == 0


def test_taylor_features_are_those_of_the_exponential_to_second_order():
    q, k = noise(50, 5), noise(50, 5, seed=3)
    s = (q * k).sum(-1)
    torch.testing.assert_close((features(q) * features(k)).sum(-1), 1 + s + s**2 / 2)
    assert (1 + s + s**2 / 2).min() >= 0.5


@pytest.mark.parametrize("length", [1, 15, 16, 37])
def test_the_scan_equals_the_matrix_in_outputs_and_gradients_and_goes_on_from_its_sums(length):
    q, k, v = (noise(2, length, 3, seed=n).requires_grad_() for n in range(3))
    there = (torch.arange(length) >= 2)[:, None]
    whole = taylor_naive(q, k, with_one(v, there), torch.ones(length, length, dtype=torch.bool).tril())
    sums, parts = torch.zeros(2, 13, 4, dtype=torch.float64), []
    for a, b in zip((0, 1, 20), (1, 20, length)):
        if a < min(b, length):
            y, sums = taylor_scan(q[:, a:b], k[:, a:b], with_one(v, there)[:, a:b], sums)
            parts.append(y)
    assert torch.count_nonzero(whole[:, :2]) == 0, "where there is no key there is nothing"
    for y in (taylor_scan(q, k, with_one(v, there), torch.zeros(2, 13, 4).double())[0], torch.cat(parts, 1)):
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)
        pairs = zip(*(torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (y, whole)))
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def attention_with_talking_heads(layer, x, layout):
    """The equation of a layer without edges, one head after the other."""
    nodes, u = layer.nodes, layer.norm1(x)
    heads, width = nodes.heads, nodes.head_width
    q, k, v = nodes.qkv(u).unflatten(-1, (3, heads, width)).unbind(2)
    rotary = layout.rotary(width, 10000.0, x.dtype)
    q, k = (rotary.rotate(z.transpose(1, 2)).transpose(1, 2) for z in (q, k))
    scores = [q[:, :, h] @ k[:, :, h].transpose(1, 2) / width**0.5 for h in range(heads)]
    mixing = torch.eye(heads, dtype=x.dtype) + nodes.talk
    talked = [sum(mixing[h, g] * scores[g] for g in range(heads)) for h in range(heads)]
    weights = [s.masked_fill(~layout.mask()[:, 0], -torch.inf).softmax(-1) for s in talked]
    gates = torch.sigmoid(nodes.gate(u))
    y = torch.cat([gates[:, :, h, None] * (weights[h] @ v[:, :, h]) for h in range(heads)], dim=-1)
    x = x + nodes.out(y)
    return x + layer.channel(layer.norm2(x), layout)[0]


@pytest.mark.parametrize("cuts", [(), (1, 5)])
def test_without_a_bias_of_edges_it_is_attention_with_talking_heads(cuts):
    model, layout, x = quartic(), layout_of(cuts), noise(B, T, D)
    for layer in model.layers:
        torch.nn.init.zeros_(layer.nodes.edge_bias.weight)
    expected = x
    for layer in model.layers:
        expected = attention_with_talking_heads(layer, expected, layout)
    torch.testing.assert_close(model(x, layout).x_BTD, expected, rtol=0, atol=1e-12)


def test_edges_are_rows_columns_and_distances_and_bias_the_scores():
    """One layer, by its equation: a bias of edges is what is added to the scores."""
    model, layout, x = quartic(depth=1), Layout.single(B, T), noise(B, T, D)
    start, nodes = model.start, model.layers[0].nodes
    e, rows, _ = start(x, layout, None)
    u = start.norm(x)
    for i, j in ((5, 2), (5, 5), (8, 0)):
        distance = start.distance(F.silu(start.log_distance(torch.tensor([1.0 + i - j], dtype=torch.float64).log())))
        torch.testing.assert_close(e[:, i, j], start.row(u[:, i]) + start.column(u[:, j]) + distance)
    _, told, _ = nodes(x, e, rows, None)
    _, without, _ = nodes(x, torch.zeros_like(e), rows, None)
    bias = nodes.edge_bias(nodes.edge_norm(e)).mean(-1)
    torch.testing.assert_close(told.scores_BTS, without.scores_BTS + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_every_combination_of_mixers_is_causal_isolated_and_decodes_as_it_trains(subset):
    model, x = quartic(edge_mixers=list(subset)), noise(B, T, D)
    for layout in (Layout.single(B, T), layout_of()):
        whole = model(x, layout).x_BTD
        for t in range(1, T):
            changed = x.clone()
            changed[0, t:] += 1
            after = model(changed, layout).x_BTD
            assert torch.equal(after[0, :t], whole[0, :t])
            assert torch.equal(after[1], whole[1])
            assert (after[0, t:] != whole[0, t:]).any()
        state, parts = model.initial_state(B, x), []
        for a, b in zip((0, *CUTS), (*CUTS, T)):
            out = model(x[:, a:b], piece(layout, a, b), state)
            state, parts = out.state, [*parts, out.x_BTD]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)
    short = model(x[:, :4], Layout.single(B, 4)).x_BTD
    torch.testing.assert_close(short, model(x, Layout.single(B, T)).x_BTD[:, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_parameter_is_dead_and_the_last_layer_has_no_edges_to_update(depth, mixer):
    model, x = quartic(depth, edge_mixers=[mixer]), noise(B, T, D)
    model(x, layout_of()).x_BTD.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0] == []
    assert [layer.update is None for layer in model.layers] == [False] * (depth - 1) + [True]


@pytest.mark.parametrize("streams", [2, 4])
def test_hyper_connections_begin_as_plain_residuals(streams):
    plain, hyper = (stack.make(config_of(streams=n)).double() for n in (1, streams))
    initialise(plain, 0)
    initialise(hyper, 0)
    x, layout = noise(B, T, D), layout_of()
    torch.testing.assert_close(hyper(x, layout).x_BTD, streams * plain(x, layout).x_BTD, rtol=0, atol=1e-12)


def test_a_model_in_bf16_keeps_its_streams_exact_and_trains():
    ids, layout = torch.arange(B * T).view(B, T) % 7, layout_of()
    batch = Batch(ids, ids, layout.doc_BT, layout.pos_BT, torch.zeros(B, dtype=torch.long), B * T, True)
    model = shaken(build(config_of(streams=2, edge_mixers=list(MIXERS)), 7).to_empty(device="cpu")).bfloat16()
    seen = []
    model.blocks.layers[1].connect1.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    model(batch).total.backward()
    assert seen == [torch.float32]
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_hyper_connections_are_their_equation():
    connection = shaken(quartic(streams=3).layers[1].connect2)
    h, out = noise(1, 1, 3, D), torch.zeros(1, 1, 3, D, dtype=torch.float64)
    unit = h[0, 0] * torch.rsqrt(h[0, 0].square().mean(-1, keepdim=True) + 1e-6) * connection.gain
    a = connection.mix + connection.scales[0] * torch.tanh(unit @ connection.mix_by)
    b = 1 + connection.write + connection.scales[1] * torch.tanh(unit @ connection.write_by)[:, 0]
    # the fourth branch reads the first of three streams
    a = a + torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    read = sum(a[n, 0] * h[0, 0, n] for n in range(3))
    for m in range(3):
        out[0, 0, m] = sum(a[n, 1 + m] * h[0, 0, n] for n in range(3)) + b[m] * read.sin()
    got, extra = connection(h, lambda x_BTD: (x_BTD.sin(), "more"))
    torch.testing.assert_close(got, out, rtol=0, atol=1e-12)
    assert extra == "more"


def test_members_of_an_ensemble_may_be_quartic():
    """Under torch.func.vmap over parameters and inputs it computes what a loop over them does."""
    members = [shaken(stack.make(config_of(edge_mixers=list(MIXERS), streams=2)), seed) for seed in (0, 5)]
    x, layout = noise(2, B, T, D), layout_of()
    together = vmap(lambda p, b, x_BTD: functional_call(members[0], (p, b), (x_BTD, layout)).x_BTD)(
        *stack_module_state(members), x
    )
    for member, value, got in zip(members, x, together):
        torch.testing.assert_close(got, member(value, layout).x_BTD, rtol=0, atol=1e-12)


def test_in_bf16_most_distances_are_still_told_apart():
    start = EdgeStart(config_of(), C).to_empty(device="cpu")
    initialise(start, 0)
    with torch.no_grad():
        rel_SC = start.bfloat16()._relative(torch.zeros(1, 300, D, dtype=torch.bfloat16), 300)[-1]
    # in bf16 there are 110 logarithms of them
    assert len(rel_SC.unique(dim=0)) > 200
