"""Every stack in a whole model, the same promises as every mixer. A new stack is tested with no edit here."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import Batch
from pretrain.channels.moe import Router
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.stack import REGISTRY
from tests.contract.cases import LENGTH, ROWS, VOCAB, WIDTH, noise, packed, piece, shaken, tokens

# keys of the model, per stack, that are worth the whole contract; a stack without an entry is run as it is
VARIANTS: dict[str, list[dict[str, object]]] = {
    "blocks": [
        {},
        {"depth": 1, "wrap": {"passes": 3}},
        {"wrap": {"passes": 2, "loss": "mean_all", "checkpoint": True}},
        {"channel": {"name": "moe"}},
        {"channel": {"name": "moe", "options": {"experts": 4, "shared": 1, "balance": "bias", "corr_router": 4}}},
        {"depth": 1, "channel": {"name": "moe", "options": {"corr_router": 4}}, "wrap": {"passes": 2}},
    ],
    "geodesic": [{}, {"options": {"method": "semi_implicit", "rank": 1, "features": 9, "steps": 2, "truncate": 8}}],
    "quartic": [
        {},
        {"options": {"edge_mixers": ["row"], "streams": 4}},
        {"options": {"edge_mixers": ["prefix", "top", "diagonal"], "routed": 3}},
        {"options": {"edge_mixers": []}, "norm": "layernorm", "bias": True, "positions": "learned", "depth": 1},
    ],
    "multistream": [
        {"options": {"heads": 2}},
        {"options": {"heads": 2, "streams": 3, "talking": "nonlinear", "diversity": 0.1}},
        {"options": {"heads": 2}, "channel": {"name": "moe", "options": {"corr_router": 4}}},
        {"options": {"heads": 2, "talking": "none"}, "norm": "layernorm", "bias": True, "positions": "none"},
    ],
    "relational": [
        {},
        {"channel": {"name": "moe", "options": {"corr_router": 4}}},
        {"options": {"heads": 2, "edge_width": 6}, "norm": "layernorm", "bias": True, "positions": "none"},
    ],
}
CASES = [(name, keys) for name in REGISTRY.names() for keys in VARIANTS.get(name, [{}])]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]

EXACT, STREAM = 1e-12, 1e-10
over_stacks = pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)


def config_of(name, keys):
    """A model of two layers over a stack. keys: of the model; `options` are the stack's own."""
    own = {key: value for key, value in keys.items() if key != "options"}
    stack = {"name": name, "options": keys.get("options", {})}
    return checked(ModelConfig, Layers({"width": WIDTH, "depth": 2, "length": LENGTH, "stack": stack} | own))


def make_stacked(name, keys):
    """The model in float64 with random parameters, none of them zero."""
    return shaken(build(config_of(name, keys), VOCAB).to_empty(device="cpu"))


def batch_of(layout: Layout) -> Batch:
    """Random rows of a layout, every token counted but the last of each document."""
    targets = tokens(seed=4).masked_fill(torch.diff(layout.doc_BT, append=layout.doc_BT[:, -1:]) != 0, -100)
    count = int((targets != -100).sum())
    return Batch(tokens(), targets, layout.doc_BT, layout.pos_BT, torch.zeros(ROWS, dtype=torch.long), count, True)


@over_stacks
def test_a_later_token_changes_nothing_before_it_and_something_from_it_on(name, keys):
    model, ids, layout = make_stacked(name, keys), tokens(), Layout.single(ROWS, LENGTH)
    slack = EXACT if any(getattr(module, "rounding", False) for module in model.modules()) else 0.0
    before = model.logits(ids, layout)
    for t in (1, 20, LENGTH - 1):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 1) % VOCAB
        after = model.logits(changed, layout)
        torch.testing.assert_close(after[0, :t], before[0, :t], rtol=0, atol=slack)
        assert (after[0, t:] - before[0, t:]).abs().amax(-1).min() > slack
        torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=slack)


@over_stacks
def test_no_gradient_flows_from_an_output_to_a_later_input(name, keys):
    stack, x = make_stacked(name, keys).blocks, noise(2, LENGTH, WIDTH).requires_grad_()
    (grad,) = torch.autograd.grad(stack(x, Layout.single(2, LENGTH)).x_BTD[0, 20].sum(), x)
    assert torch.count_nonzero(grad[0, 21:]) == 0
    assert torch.count_nonzero(grad[1]) == 0
    assert torch.count_nonzero(grad[0, :21]) > 0


@over_stacks
def test_the_length_of_a_row_does_not_change_its_prefix_and_a_row_alone_is_the_same(name, keys):
    model, ids = make_stacked(name, keys), tokens()
    whole = model.logits(ids, Layout.single(ROWS, LENGTH))
    for t in (1, 7, 31):
        part = model.logits(ids[:1, :t], Layout.single(1, t))
        torch.testing.assert_close(part, whole[:1, :t], rtol=0, atol=EXACT)


@over_stacks
def test_a_packed_document_is_read_as_if_it_stood_alone(name, keys):
    model, ids, layout = make_stacked(name, keys), tokens(), packed()
    together = model.logits(ids, layout)
    for row in range(ROWS):
        for number in layout.doc_BT[row].unique():
            place = torch.nonzero(layout.doc_BT[row] == number).flatten()
            alone = model.logits(ids[row : row + 1, place], Layout.single(1, len(place)))
            torch.testing.assert_close(together[row : row + 1, place], alone, rtol=0, atol=EXACT)


@over_stacks
@pytest.mark.parametrize("kind", ["one document a row", "packed documents"])
def test_decoding_step_by_step_and_in_pieces_equals_the_training_form(name, keys, kind):
    model, ids = make_stacked(name, keys), tokens()
    layout = packed() if kind == "packed documents" else Layout.single(ROWS, LENGTH)
    whole = model.logits(ids, layout)
    for cuts in (range(1, LENGTH), (5, 23), (17,)):
        state, parts = model.initial_state(ROWS), []
        for start, stop in zip((0, *cuts), (*cuts, LENGTH)):
            logits, state = model.decode(ids[:, start:stop], state, piece(layout, start, stop))
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=STREAM)


@over_stacks
def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(name, keys):
    grads, batch = [], batch_of(packed())
    for recompute in (False, True):
        model = make_stacked(name, keys).train()
        if recompute:
            model.recompute()
        model(batch).total.backward()
        dead = [n for n, p in model.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0]
        assert dead == []
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@over_stacks
@pytest.mark.parametrize("length", [16, LENGTH])
def test_the_formula_for_operations_equals_those_counted(name, keys, length):
    stack = make_stacked(name, keys).blocks
    single = Layout.single(2, length)
    stream = Layout(single.doc_BT, single.pos_BT, False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        stack(noise(2, length, WIDTH), stream)
    counted = counter.get_total_flops() / (2 * length)
    stated = stack.flops_per_token(length) + stack.halved_flops_per_token(length)
    assert counted == pytest.approx(stated, rel=0.02)


@over_stacks
def test_the_stated_size_of_the_state_is_that_of_its_tensors(name, keys):
    model, length = make_stacked(name, keys), 40
    _, state = model.decode(tokens()[:1, :length], model.initial_state(1))
    held = sum(t.numel() for t in tree_leaves(state) if torch.is_tensor(t) and t.is_floating_point())
    assert 2 * held == pytest.approx(model.state_bytes(length), rel=0.02)


@over_stacks
def test_it_is_built_on_the_meta_device_with_the_same_shapes(name, keys):
    shapes = {n: p.shape for n, p in build(config_of(name, keys), VOCAB).named_parameters()}
    assert shapes == {n: p.shape for n, p in make_stacked(name, keys).named_parameters()}


def choose_alike(first, second):
    """Routers of `second` give the logits that those of `first` gave just before: a token near the border of two
    experts would choose the other one, and bf16 is asked about values, not choices.
    Returns how many routers there are."""
    logits, routers = [], [[m for m in stack.modules() if isinstance(m, Router)] for stack in (first, second)]
    for one, other in zip(*routers):
        one.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
        other.register_forward_hook(lambda module, inputs, output: output + (logits.pop(0) - output.detach()))
    return len(routers[0])


@over_stacks
def test_bf16_stays_near_float64_in_outputs_and_gradients(name, keys):
    exact, low, layout = make_stacked(name, keys).blocks, make_stacked(name, keys).blocks.bfloat16(), packed()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters()):
            p.copy_(q)
    # what bf16 does to a router's logits, the gates raise to a power
    drift = 1e-1 if choose_alike(exact, low) else 5e-2
    x, results = noise(ROWS, LENGTH, WIDTH).bfloat16(), []
    for stack, value in ((exact, x.double()), (low, x)):
        value = value.clone().requires_grad_()
        y = stack(value, layout).x_BTD
        y.double().square().mean().backward()
        results.append((y.double(), value.grad.double()))
    for a, b in zip(*results):
        assert (a - b).norm() / a.norm() < drift
