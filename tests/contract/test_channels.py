"""Every channel mixer, the same promises."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain import channel
from pretrain.layout import Layout
from pretrain.mixer import Site
from tests.contract.cases import LENGTH, ROWS, WIDTH, noise, packed, shaken

over_channels = pytest.mark.parametrize("name", channel.REGISTRY.names())


def make(name, bias=False):
    return shaken(channel.make(name, {}, Site(WIDTH, LENGTH, 0, 2, bias=bias)))


@over_channels
def test_a_later_token_changes_nothing_before_it(name):
    chan, x = make(name), noise(ROWS, LENGTH, WIDTH)
    before, _ = chan(x, Layout.single(ROWS, LENGTH))
    changed = x.clone()
    changed[0, 20:] += 1
    after, _ = chan(changed, Layout.single(ROWS, LENGTH))
    assert torch.equal(after[0, :20], before[0, :20])
    assert torch.equal(after[1:], before[1:])
    assert (after[0, 20:] != before[0, 20:]).any()


@over_channels
@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_gets_a_gradient(name, bias):
    chan = make(name, bias)
    chan(noise(ROWS, LENGTH, WIDTH), packed())[0].square().sum().backward()
    assert [n for n, p in chan.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0] == []


@over_channels
def test_the_formula_for_operations_equals_those_counted(name):
    chan = make(name)
    with FlopCounterMode(display=False) as counter:
        chan(noise(2, LENGTH, WIDTH), Layout.single(2, LENGTH))
    assert counter.get_total_flops() / (2 * LENGTH) == pytest.approx(chan.flops_per_token(), rel=0.02)


@over_channels
def test_it_is_built_on_the_meta_device(name):
    with torch.device("meta"):
        chan = channel.make(name, {}, Site(WIDTH, LENGTH, 0, 2))
    assert all(p.is_meta for p in chan.parameters())


@over_channels
def test_bf16_stays_near_float64(name):
    exact, low, x = make(name), make(name).bfloat16(), noise(ROWS, LENGTH, WIDTH).bfloat16()
    exact.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    a, b = exact(x.double(), packed())[0], low(x, packed())[0].double()
    assert (a - b).norm() / a.norm() < 5e-2
