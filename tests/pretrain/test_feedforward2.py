"""Feed-Forward2: products of matrices one after the other against the outer product written out."""

from __future__ import annotations

import pytest
import torch

from pretrain import channel
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.mixer import Site
from pretrain.ops.outer import outer_linear, outer_linear_naive
from tests.contract.cases import WIDTH, noise, packed, shaken
from tests.pretrain.test_ops import both


def make(options=None, bias=True, width=WIDTH):
    return shaken(channel.make("feedforward2", options or {}, Site(width, 48, 0, 3, bias=bias)))


@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 4)])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_the_sum_over_matrices_equals_the_outer_product_in_outputs_and_gradients(shape, factor):
    a, b, weight = noise(*shape, 6), noise(*shape, factor, seed=3), noise(9, factor * 6, seed=4)
    for got, expected in both(outer_linear, outer_linear_naive, a, b, weight):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_its_gradients_are_those_of_finite_differences():
    inputs = [x.requires_grad_() for x in (noise(2, 3, 4), noise(2, 3, 2, seed=3), noise(5, 8, seed=4))]
    assert torch.autograd.gradcheck(outer_linear, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_the_channel_mixer_is_the_published_sum(bias):
    chan, x = make(bias=bias), noise(2, 9, WIDTH)
    a, b = (z * torch.sigmoid(z) for z in (chan.first(x), chan.second(x)))
    w3_ijk = chan.weight.unflatten(1, (8, WIDTH)).permute(2, 1, 0)
    expected = torch.einsum("bti,btj,ijk->btk", a, b, w3_ijk) + (chan.bias if bias else 0)
    torch.testing.assert_close(chan(x, packed(2, 9))[0], expected, rtol=1e-12, atol=1e-12)


def test_parameters_number_what_the_equations_say():
    for width in (8, 64):
        made = channel.make("feedforward2", {}, Site(width, 48, 0, 3, bias=True))
        assert sum(p.numel() for p in made.parameters()) == 9 * width**2 + 10 * width + 8
    assert 9 * 64**2 + 10 * 64 + 8 == 37_512


def test_neither_pass_holds_the_outer_product():
    """No tensor that is kept or made has 8 D numbers a token."""
    tokens, width = 512, 16
    a, b = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(width, 8 * width, requires_grad=True)
    kept, made = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.untyped_storage().nbytes() // 4 for t in torch.utils._pytree.tree_leaves(out))
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t), Watch():
        outer_linear(a, b, weight).sum().backward()
    assert sum(kept) == a.numel() + b.numel() + weight.numel()
    assert max(made) <= tokens * width


def test_the_outer_product_begins_as_the_end_of_every_residual_branch_does():
    chan = channel.make("feedforward2", {}, Site(64, 48, 0, 3))
    initialise(chan, 0)
    assert chan.weight.std().item() == pytest.approx(0.25 / (2 * 3 * 8 * 64) ** 0.5, rel=0.05)


def test_many_members_run_at_once_and_learn():
    members, x, layout = [make(width=8) for _ in range(3)], noise(3, 2, 5, 8), Layout.single(2, 5)
    for i, member in enumerate(members):
        for p in member.parameters():
            p.data += 0.1 * i
    params, _ = torch.func.stack_module_state(members)
    call = lambda p, x: torch.func.functional_call(members[0], p, (x, layout))[0]  # noqa: E731
    together = torch.func.vmap(call)(params, x)
    together.square().sum().backward()
    inside = torch.func.vmap(torch.func.grad(lambda p, x: call(p, x).square().sum()))(params, x)
    for i, member in enumerate(members):
        y = member(x[i], layout)[0]
        torch.testing.assert_close(together[i], y, rtol=1e-12, atol=1e-12)
        y.square().sum().backward()
        for name, p in member.named_parameters():
            torch.testing.assert_close(params[name].grad[i], p.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(inside[name][i], p.grad, rtol=1e-10, atol=1e-10)
