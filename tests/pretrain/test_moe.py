"""The mixture of experts against what it must equal, its losses against their formulas, its balance over time."""

from __future__ import annotations

import math

import pytest
import torch

from configs.errors import ConfigError
from pretrain import channel
from pretrain.layout import Layout
from pretrain.members import Members
from pretrain.mixer import Site
from pretrain.ops.experts import grouped_linear, grouped_linear_naive, has_grouped_product, permuted, sorting
from tests.contract.cases import LENGTH, ROWS, WIDTH, noise, packed, shaken

SITE = Site(WIDTH, LENGTH, 0, 2, bias=True)
LAYOUT = Layout.single(ROWS, LENGTH)


def make(name="moe", **options):
    return shaken(channel.make(name, options, SITE))


def made_equal(moe):
    """All experts with the first one's values."""
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return moe


def dense_of(moe, activation="gelu", number=0):
    """The plain channel mixer with the values of one expert."""
    name, own = ("swiglu", {}) if activation == "swiglu" else ("mlp", {"activation": activation})
    hidden = moe.experts.down.shape[-1]
    plain = make(name, mult=hidden / WIDTH, **own)
    first = plain.gate_up if activation == "swiglu" else plain.up
    with torch.no_grad():
        for layer, which in ((first, "up"), (plain.down, "down")):
            layer.weight.copy_(getattr(moe.experts, which)[number])
            layer.bias.copy_(getattr(moe.experts, f"{which}_bias")[number])
    return plain


def check_same(a, b, x, layout=LAYOUT):
    """Equal outputs, and equal gradients of the input."""
    results = []
    for part in (a, b):
        value = x.clone().requires_grad_()
        y = part(value, layout)[0]
        y.square().sum().backward()
        results.append((y, value.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "relu", "leaky_relu", "swiglu"])
def test_one_expert_and_equal_experts_are_the_dense_network(activation):
    x = noise(ROWS, LENGTH, WIDTH)
    alone = make(experts=1, top_k=1, activation=activation)
    check_same(alone, dense_of(alone, activation), x)
    equal = made_equal(make(experts=6, top_k=3, activation=activation))
    check_same(equal, dense_of(equal, activation), x)


def test_the_order_of_experts_does_not_matter():
    moe, other, order = make(experts=5), make(experts=5), torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for mine, its in zip(moe.parameters(), other.parameters()):
            its.copy_(mine[order])
    check_same(moe, other, noise(ROWS, LENGTH, WIDTH))


def test_choosing_all_experts_is_the_soft_mixture():
    moe, x = make(experts=4, top_k=4), noise(ROWS, LENGTH, WIDTH)
    p = torch.softmax(x @ moe.router.weight.T, dim=-1)
    expected = sum(p[..., e, None] * dense_of(moe, number=e)(x, LAYOUT)[0] for e in range(4))
    torch.testing.assert_close(moe(x, LAYOUT)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"shared": 2, "activation": "swiglu"}, {"experts": 5, "top_k": 1}])
def test_a_loop_over_tokens_and_the_form_without_dynamic_shapes_give_the_same(options):
    moe, x = make(**options), noise(ROWS, LENGTH, WIDTH)
    y, _ = moe(x, LAYOUT)
    flat = x.flatten(0, 1)
    choice = moe._choose(flat)
    torch.testing.assert_close(moe._everywhere(flat, choice).view(y.shape), y, rtol=1e-12, atol=1e-12)
    plain = [dense_of(moe, moe.config.activation, e) for e in range(moe.config.experts)]
    for n in (0, 7, 100):
        p = torch.softmax(moe.router.weight @ flat[n], dim=-1).detach()
        best = sorted(range(len(p)), key=lambda e: -float(p[e]))[: moe.config.top_k]
        one, layout = flat[n].view(1, 1, -1), Layout.single(1, 1)
        # of one alone the share would be 1
        whole = p[best].sum() if len(best) > 1 else 1.0
        expected = sum(p[e] / whole * plain[e](one, layout)[0] for e in best)
        if moe.shared is not None:
            expected = expected + moe.shared(one[0], torch.tensor([1]))
        torch.testing.assert_close(y.flatten(0, 1)[n], expected.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_a_router_that_chooses_one_expert_learns_from_the_output_alone(balance):
    moe = make(experts=4, top_k=1, balance=balance, z_loss=0.0)
    y, _ = moe(noise(ROWS, LENGTH, WIDTH), LAYOUT)
    y.square().sum().backward()
    assert moe.router.weight.grad.norm(dim=1).min() > 1e-3


def test_gradients_of_both_forms_are_the_same():
    x, grads = noise(ROWS, LENGTH, WIDTH).flatten(0, 1), []
    for form in ("_where_chosen", "_everywhere"):
        moe = make(shared=1)
        choice = moe._choose(x)
        (getattr(moe, form)(x, choice).square().sum() + moe._told(choice).loss).backward()
        grads.append({name: p.grad for name, p in moe.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-10, atol=1e-12)


def test_active_parameters_are_those_of_the_dense_network():
    dense = make("mlp").flops_per_token()
    for options in ({}, {"experts": 16, "top_k": 4}, {"experts": 4, "top_k": 1, "shared": 1}):
        moe = make(**options)
        assert moe.flops_per_token() - 2 * moe.router.weight.numel() == pytest.approx(dense, rel=0.01)


def test_losses_and_measures_are_their_formulas():
    moe, x = make(experts=4, balance_loss=0.3, z_loss=0.2), noise(ROWS, LENGTH, WIDTH)
    _, aux = moe(x, LAYOUT)
    logits = (x @ moe.router.weight.T).flatten(0, 1)
    p, count = torch.softmax(logits, -1).detach(), [0] * 4
    for row in p:
        for e in sorted(range(4), key=lambda e: -float(row[e]))[:2]:
            count[e] += 1
    share = torch.tensor(count).double() / sum(count)
    balance = 4 * (share * p.mean(0)).sum()
    z = torch.log(logits.exp().sum(-1)).square().mean()
    torch.testing.assert_close(aux.loss, 0.3 * balance + 0.2 * z, rtol=1e-12, atol=0)
    told = dict(zip(moe.measure_names(), aux.measures.tolist()))
    assert [told[f"load.{e}"] for e in range(4)] == count
    assert told["entropy"] == pytest.approx(float(-(p * p.log()).sum()))
    assert told["dropped"] == 0.0
    figures = moe.figures(aux.measures.tolist())
    assert sum(figures[f"load.{e}"] for e in range(4)) == pytest.approx(1.0)
    assert 0 < figures["entropy"] < math.log(4)
    assert not aux.measures.requires_grad
    assert make(balance="none", z_loss=0.0)(x, LAYOUT)[1].loss == 0.0


def test_a_uniform_router_has_the_least_balancing_loss():
    x = noise(ROWS, LENGTH, WIDTH)
    losses = []
    for scale in (0.0, 1.0, 30.0):
        moe = make(balance_loss=1.0, z_loss=0.0, experts=4, top_k=1)
        with torch.no_grad():
            moe.router.weight.mul_(scale).add_(0.01 * scale)
        losses.append(moe(x, LAYOUT)[1].loss.item())
    assert losses[0] == pytest.approx(1.0)
    assert losses == sorted(losses)


def test_biases_bring_a_skewed_router_towards_equal_loads_without_weighing_outputs():
    moe, x = make(experts=4, top_k=1, balance="bias", bias_step=0.02), noise(ROWS, LENGTH, WIDTH)
    x[..., 0] = 1.0
    with torch.no_grad():
        moe.router.weight[0, 0] += 3.0  # everybody likes expert 0
    loads, before = [], None
    for _ in range(200):
        y, aux = moe(x, LAYOUT)
        before = y if before is None else before
        loads.append(aux.measures[:4] / aux.measures[:4].sum())
        moe.settle(aux.measures.tolist())
    assert loads[0].max() > 0.6
    assert loads[-1].max() < 0.35
    assert moe.router.nudges.dtype == torch.int64
    assert int(moe.router.nudges[0]) < 0 < int(moe.router.nudges[1:].max())
    # a bias as large for all changes no choice, and so no output: it does not weigh
    moe.router.nudges.fill_(1000)
    torch.testing.assert_close(moe(x, LAYOUT)[0], before, rtol=0, atol=0)


def test_without_measures_of_imbalance_no_bias_moves():
    moe = make(experts=4, balance="bias")
    moe.settle([6.0, 6.0, 6.0, 6.0, 1.0, 0.0])
    assert moe.router.nudges.tolist() == [0, 0, 0, 0]
    moe.settle([9.0, 6.0, 6.0, 3.0, 1.0, 0.0])
    assert moe.router.nudges.tolist() == [-1, 0, 0, 1]


def test_a_frozen_router_keeps_its_biases():
    moe = make(experts=4, balance="bias")
    moe.router.requires_grad_(False)
    moe.settle([9.0, 6.0, 6.0, 3.0, 1.0, 0.0])
    assert moe.router.nudges.tolist() == [0, 0, 0, 0]


def test_the_mean_that_decides_is_of_the_last_tokens_of_the_document():
    moe, x, layout = make(corr_router=3), noise(ROWS, LENGTH, WIDTH), packed()
    features = moe._features(x, moe.initial_state(ROWS, x), layout)
    for row, t in ((0, 0), (0, 1), (0, 3), (1, 20), (2, 47)):
        first = max(0, t - 2, t - int(layout.pos_BT[row, t]))
        torch.testing.assert_close(features[row, t], x[row, first : t + 1].mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_loop(counts, dtype):
    counts = torch.tensor(counts)
    rows, weight = noise(int(counts.sum()), 16).to(dtype), noise(4, 24, 16).to(dtype)
    assert has_grouped_product(rows, weight)
    results = []
    for form in (lambda r, w: grouped_linear(r, w, None, counts), lambda r, w: grouped_linear_naive(r, w, counts)):
        r, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        y = form(r, w)
        y.square().sum().backward()
        results.append((y, r.grad, w.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    assert not has_grouped_product(noise(3, 15).float(), noise(4, 24, 15).float())


def test_rows_come_back_to_where_they_were():
    keys, rows = torch.tensor([2, 0, 1, 0, 2]), noise(5, 3).requires_grad_()
    order, inverse = sorting(keys)
    assert order.tolist() == [1, 3, 2, 0, 4]
    again = permuted(permuted(rows, order, inverse), inverse, order)
    (again * torch.arange(5)[:, None]).sum().backward()
    assert torch.equal(again, rows)
    assert torch.equal(rows.grad, torch.arange(5.0, dtype=torch.float64)[:, None].expand(5, 3))


def test_a_token_keeps_its_expert_whatever_else_is_in_the_batch():
    moe, x = make(experts=4, top_k=1), noise(ROWS, LENGTH, WIDTH)
    x[1:] = x[0, 0]  # all others want one expert: nothing is dropped
    y, aux = moe(x, LAYOUT)
    alone, _ = moe(x[:1], Layout.single(1, LENGTH))
    torch.testing.assert_close(y[:1], alone, rtol=0, atol=1e-12)
    assert aux.measures[-1] == 0
    assert int(aux.measures[:4].sum()) == ROWS * LENGTH


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="choose at most all"):
        make(experts=2, top_k=3)
    with pytest.raises(ConfigError, match="balance: loss"):
        Members(lambda: channel.make("moe", {"balance": "bias"}, SITE), ["a"])


@pytest.mark.parametrize(
    "options",
    [
        {"balance": "bias", "balance_loss": 0.1}, {"balance": "none", "balance_loss": 0.1},
        {"balance": "loss", "bias_step": 0.1}, {"balance": "none", "bias_step": 0.1}, {"bias_step": 0.1},
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(options):
    with pytest.raises(ConfigError, match="does nothing with balance"):
        make(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mlp", {"mult": 0.01}), ("swiglu", {"mult": 0.01}), ("moe", {"mult": 0.1, "experts": 8, "top_k": 8})],
)
def test_a_hidden_width_of_zero_is_refused(name, options):
    with pytest.raises(ConfigError, match="leaves no hidden unit; make mult"):
        make(name, **options)
