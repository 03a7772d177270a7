"""Every channel mixer, the same promises."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import ConfigError
from pretrain import channel
from pretrain.layout import Layout
from pretrain.members import Members
from pretrain.mixer import Site
from tests.contract.cases import LENGTH, ROWS, WIDTH, noise, packed, piece, shaken

# options beyond the defaults that are worth the whole contract
VARIANTS: dict[str, list[dict[str, object]]] = {
    "moe": [
        {},
        {"experts": 5, "top_k": 3, "shared": 1, "activation": "swiglu"},
        {"experts": 4, "balance": "bias", "corr_router": 4},
    ],
}
CASES = [(name, options) for name in channel.REGISTRY.names() for options in VARIANTS.get(name, [{}])]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}" for name, options in CASES]
over_channels = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def make(name, options, bias=False):
    return shaken(channel.make(name, options, Site(WIDTH, LENGTH, 0, 2, bias=bias)))


@over_channels
def test_a_later_token_changes_nothing_before_it(name, options):
    chan, x = make(name, options), noise(ROWS, LENGTH, WIDTH)
    slack = 1e-12 if chan.rounding else 0.0
    before, _ = chan(x, Layout.single(ROWS, LENGTH))
    changed = x.clone()
    changed[0, 20:] += 1
    after, _ = chan(changed, Layout.single(ROWS, LENGTH))
    torch.testing.assert_close(after[0, :20], before[0, :20], rtol=0, atol=slack)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=slack)
    assert (after[0, 20:] - before[0, 20:]).abs().amax(-1).min() > slack


@over_channels
def test_a_packed_document_is_read_as_if_it_stood_alone(name, options):
    chan, x, layout = make(name, options), noise(ROWS, LENGTH, WIDTH), packed()
    together, _ = chan(x, layout)
    for row in range(ROWS):
        for number in layout.doc_BT[row].unique():
            place = torch.nonzero(layout.doc_BT[row] == number).flatten()
            alone, _ = chan(x[row : row + 1, place], Layout.single(1, len(place)))
            torch.testing.assert_close(together[row : row + 1, place], alone, rtol=0, atol=1e-12)


@over_channels
def test_token_by_token_and_in_pieces_equal_the_training_form(name, options):
    chan, x, layout = make(name, options), noise(ROWS, LENGTH, WIDTH), packed()
    whole, _ = chan(x, layout)
    for cuts in (range(1, LENGTH), (5, 23)):
        state, parts = chan.initial_state(ROWS, x), []
        for start, stop in zip((0, *cuts), (*cuts, LENGTH)):
            y, state = chan.stream(x[:, start:stop], piece(layout, start, stop), state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    held = 0 if state is None else 2 * state[0].numel()
    assert held == chan.state_bytes()


@over_channels
def test_members_run_as_one_equal_each_alone(name, options):
    x, layout = noise(2, ROWS, LENGTH, WIDTH), packed()
    if list(make(name, options).buffers()):
        with pytest.raises(ConfigError, match="keeps counts"):
            Members(lambda: channel.make(name, options, Site(WIDTH, LENGTH, 0, 2)), ["a", "b"])
        return
    members = Members(lambda: channel.make(name, options, Site(WIDTH, LENGTH, 0, 2)), ["a", "b"])
    shaken(members.to_empty(device="cpu"))
    y, _ = members(x, layout)
    for number in range(2):
        own = {key: value[number] for key, value in members.stacked().items()}
        alone = channel.make(name, options, Site(WIDTH, LENGTH, 0, 2)).double()
        alone.load_state_dict(own)
        torch.testing.assert_close(y[number], alone(x[number], layout)[0], rtol=0, atol=1e-12)


@over_channels
@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_gets_a_gradient(name, options, bias):
    chan = make(name, options, bias)
    chan(noise(ROWS, LENGTH, WIDTH), packed())[0].square().sum().backward()
    assert [n for n, p in chan.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0] == []


@over_channels
def test_the_formula_for_operations_equals_those_counted(name, options):
    chan = make(name, options)
    with FlopCounterMode(display=False) as counter:
        chan(noise(2, LENGTH, WIDTH), Layout.single(2, LENGTH))
    assert counter.get_total_flops() / (2 * LENGTH) == pytest.approx(chan.flops_per_token(), rel=0.02)


@over_channels
def test_it_is_built_on_the_meta_device(name, options):
    with torch.device("meta"):
        chan = channel.make(name, options, Site(WIDTH, LENGTH, 0, 2))
    assert all(p.is_meta for p in chan.parameters())


@over_channels
def test_bf16_stays_near_float64(name, options):
    exact, low, x = make(name, options), make(name, options).bfloat16(), noise(ROWS, LENGTH, WIDTH).bfloat16()
    exact.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in low.state_dict().items()})
    a, b = exact(x.double(), packed())[0], low(x, packed())[0].double()
    assert (a - b).norm() / a.norm() < 5e-2
