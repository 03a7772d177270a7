"""Every mixer, the same promises (oracles O1 to O6, streams, costs). A new mixer is tested with no edit here."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import ModelConfig, PartConfig
from pretrain.layout import Layout
from pretrain.mixer import REGISTRY, Site, make
from pretrain.models.language_model import build
from tests.contract.cases import (
    CASES,
    IDS,
    LENGTH,
    ROWS,
    VOCAB,
    WIDTH,
    make_mixer,
    make_model,
    noise,
    packed,
    piece,
    tokens,
)

EXACT, STREAM = 1e-12, 1e-10
ROUNDING = 1e-10
over_mixers = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


@over_mixers
def test_a_later_token_changes_nothing_before_it_and_something_from_it_on(name, options):
    model, ids, layout = make_model(name, options), tokens(), Layout.single(ROWS, LENGTH)
    before = model.logits(ids, layout)
    for t in (1, 20, LENGTH - 1):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 1) % VOCAB
        after = model.logits(changed, layout)
        assert (after[0, :t] - before[0, :t]).abs().max() <= _slack(model)
        assert (after[0, t:] - before[0, t:]).abs().amax(-1).min() > 0


def _slack(model):
    """How far an output may be moved by what it must not see: not at all, unless a mixer says that it rounds."""
    return ROUNDING if any(getattr(module, "rounding", False) for module in model.modules()) else 0.0


@over_mixers
def test_no_gradient_flows_from_an_output_to_a_later_input(name, options):
    mix, x = make_mixer(name, options), noise(1, LENGTH, WIDTH).requires_grad_()
    y, _ = mix(x, Layout.single(1, LENGTH))
    (grad,) = torch.autograd.grad(y[0, 20].sum(), x)
    assert grad[0, 21:].abs().max() <= _slack(mix)
    assert torch.count_nonzero(grad[0, :21]) > 0


@over_mixers
def test_the_length_of_a_row_does_not_change_its_prefix(name, options):
    model, ids = make_model(name, options), tokens()
    whole = model.logits(ids, Layout.single(ROWS, LENGTH))
    for t in (1, 7, 31):
        part = model.logits(ids[:, :t], Layout.single(ROWS, t))
        torch.testing.assert_close(part, whole[:, :t], rtol=0, atol=EXACT)


@over_mixers
def test_rows_of_a_batch_do_not_see_each_other(name, options):
    model, ids, layout = make_model(name, options), tokens(), Layout.single(ROWS, LENGTH)
    before = model.logits(ids, layout)
    changed = ids.clone()
    changed[1:] = tokens(seed=9)[1:]
    assert torch.equal(model.logits(changed, layout)[0], before[0])
    alone = model.logits(ids[:1], Layout.single(1, LENGTH))
    torch.testing.assert_close(alone, before[:1], rtol=0, atol=EXACT)


@over_mixers
def test_every_parameter_gets_a_gradient(name, options):
    model = make_model(name, options)
    loss = torch.nn.functional.cross_entropy(model.logits(tokens(), packed()).flatten(0, 1), tokens(seed=4).flatten())
    loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0]
    assert dead == []


@over_mixers
@pytest.mark.parametrize("kind", ["one document a row", "packed documents"])
def test_decoding_step_by_step_equals_the_training_form(name, options, kind):
    model, ids = make_model(name, options), tokens()
    layout = packed() if kind == "packed documents" else Layout.single(ROWS, LENGTH)
    whole, state, steps = model.logits(ids, layout), model.initial_state(ROWS), []
    for t in range(LENGTH):
        logits, state = model.decode(ids[:, t : t + 1], state, piece(layout, t, t + 1))
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=STREAM)


@over_mixers
@pytest.mark.parametrize("cuts", [(5,), (1, 2, 3), (23,), (16, 32), (47,)])
def test_pieces_with_a_state_equal_the_whole_in_outputs_and_gradients(name, options, cuts):
    if not REGISTRY.entry(name).part.streams:
        pytest.skip(f"{name} does not promise streams")
    mix, layout = make_mixer(name, options), packed()
    x = noise(ROWS, LENGTH, WIDTH)
    whole, grads = _run(mix, x, layout, ())
    pieces, piece_grads = _run(mix, x, layout, cuts)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=STREAM)
    for a, b in zip(piece_grads, grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=STREAM)


def _run(mix, x, layout, cuts):
    """Outputs and gradients of the training form (no cuts), or of the stream cut there."""
    x = x.clone().requires_grad_()
    mix.zero_grad()
    if cuts:
        state, parts = mix.initial_state(ROWS, x), []
        for start, stop in zip((0, *cuts), (*cuts, LENGTH)):
            y, state = mix(x[:, start:stop], piece(layout, start, stop), state)
            parts.append(y)
        y = torch.cat(parts, dim=1)
    else:
        y, _ = mix(x, layout)
    (y * noise(*y.shape, seed=5)).sum().backward()
    return y.detach(), [x.grad, *(p.grad.clone() for p in mix.parameters())]


@over_mixers
def test_a_packed_document_is_read_as_if_it_stood_alone(name, options):
    if not REGISTRY.entry(name).part.isolates:
        pytest.skip(f"{name} does not promise to isolate documents")
    model, ids, layout = make_model(name, options), tokens(), packed()
    together = model.logits(ids, layout)
    for row in range(ROWS):
        for number in layout.doc_BT[row].unique():
            place = torch.nonzero(layout.doc_BT[row] == number).flatten()
            alone = model.logits(ids[row : row + 1, place], Layout.single(1, len(place)))
            torch.testing.assert_close(together[row : row + 1, place], alone, rtol=0, atol=EXACT)


@over_mixers
def test_the_plain_causal_form_equals_the_packed_form_on_rows_of_one_document(name, options):
    mix, x, ramps = make_mixer(name, options), noise(ROWS, LENGTH, WIDTH), Layout.single(ROWS, LENGTH)
    general = Layout(ramps.doc_BT, ramps.pos_BT, False)
    torch.testing.assert_close(mix(x, ramps)[0], mix(x, general)[0], rtol=0, atol=EXACT)


@over_mixers
def test_without_a_state_no_state_comes_back(name, options):
    assert make_mixer(name, options)(noise(1, 8, WIDTH), Layout.single(1, 8))[1] is None


@over_mixers
@pytest.mark.parametrize("length", [16, LENGTH, 96])
def test_the_formula_for_operations_equals_those_counted(name, options, length):
    mix = make_mixer(name, options)
    x = noise(2, length, WIDTH)
    stream = Layout(*(getattr(Layout.single(2, length), part) for part in ("doc_BT", "pos_BT")), False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mix(x, stream)
    counted = counter.get_total_flops() / (2 * length)
    stated = mix.flops_per_token(length) + mix.halved_flops_per_token(length)
    assert counted == pytest.approx(stated, rel=0.02)


@over_mixers
def test_the_stated_size_of_the_state_is_that_of_its_tensors(name, options):
    mix, length = make_mixer(name, options), 40
    layout = Layout.single(1, length)
    _, state = mix(noise(1, length, WIDTH), Layout(layout.doc_BT, layout.pos_BT, False), mix.initial_state(1, noise(1)))
    held = sum(t.numel() for t in torch.utils._pytree.tree_leaves(state) if t.is_floating_point())
    assert 2 * held == pytest.approx(mix.state_bytes(length), rel=0.02)


@over_mixers
def test_it_is_built_on_the_meta_device_with_the_same_shapes(name, options):
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in make(name, options, Site(WIDTH, LENGTH, 0, 2)).named_parameters()}
    assert shapes == {n: p.shape for n, p in make_mixer(name, options).named_parameters()}
    model = build(ModelConfig(width=WIDTH, depth=2, length=LENGTH, mixers=(PartConfig(name=name, options=options),)), 9)
    assert all(p.is_meta for p in model.parameters())


@over_mixers
def test_bf16_stays_near_float64_in_outputs_and_gradients(name, options):
    exact, layout = make_mixer(name, options), packed()
    low = make_mixer(name, options).bfloat16()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters()):
            p.copy_(q)
    x = noise(ROWS, LENGTH, WIDTH).bfloat16()
    results = []
    for mix, value in ((exact, x.double()), (low, x)):
        value = value.clone().requires_grad_()
        y, _ = mix(value, layout)
        y.double().square().mean().backward()
        results.append((y.double(), value.grad.double()))
    for a, b in zip(*results):
        assert (a - b).norm() / a.norm() < 5e-2


@over_mixers
def test_positions_can_be_left_to_the_mixer_or_to_nobody(name, options):
    for positions in ("none", "learned"):
        make_model(name, options, positions=positions).logits(tokens(), packed())
