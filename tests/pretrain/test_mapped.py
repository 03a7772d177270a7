"""What is done for all members at once, against the same for one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from pretrain.init import linear
from pretrain.layout import Layout
from pretrain.ops import attention
from pretrain.ops.attention import attend
from pretrain.ops.mapped import at_once, is_mapped, of_all_members
from pretrain.ops.norm import rms_norm, rms_norm_naive
from tests.contract.cases import noise, packed

M = 3


def assert_same_as_in_turn(function, *inputs, in_dims=0):
    """Values and gradients in float64 of `function` mapped, and of `function` in a loop."""
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)
    inputs = [x.clone().requires_grad_() for x in inputs]
    together = vmap(function, in_dims=dims)(*inputs)
    in_turn = torch.stack(
        [function(*(x if dim is None else x.select(dim, m) for x, dim in zip(inputs, dims))) for m in range(M)]
    )
    torch.testing.assert_close(together, in_turn, rtol=0, atol=1e-12)
    weights = noise(*together.shape, seed=9)
    grads = [torch.autograd.grad((y * weights).sum(), inputs) for y in (together, in_turn)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0), (2, 1)])
def test_a_norm_of_members_is_each_members_norm(in_dims):
    x, weight = (_with_members(size, dim) for size, dim in zip(((2, 4, 5), (5,)), in_dims))
    assert_same_as_in_turn(rms_norm, x, weight, in_dims=in_dims)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (1, 1, 0)])
@pytest.mark.parametrize("rows", [(), (4,), (2, 4)])
def test_a_linear_layer_of_members_is_each_members_layer(rows, in_dims, bias):
    layer = linear(5, 6, bias=bias).double()
    in_dims = tuple(0 if dim == 1 and not rows else dim for dim in in_dims)
    inputs = [_with_members(size, dim) for size, dim in zip(((*rows, 5), (6, 5), (6,)), in_dims)]

    def call(x, weight, *rest):
        layer._parameters["weight"], layer._parameters["bias"] = weight, rest[0] if rest else None
        return layer(x)

    count = 3 if bias else 2
    assert_same_as_in_turn(call, *inputs[:count], in_dims=in_dims[:count])


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("layout", [packed(2), Layout.single(2, 48)], ids=["packed", "ramps"])
def test_attention_of_members_is_each_members_attention_in_blocks_of_any_size(layout, kv_heads, block, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    q, k = noise(M, 2, 2, 48, 6), noise(M, 2, kv_heads, 48, 6, seed=1)
    assert_same_as_in_turn(lambda *qkv: attend(*qkv, layout, 0.3), q, k, noise(M, 2, kv_heads, 48, 4, seed=2))


def test_attention_of_members_knows_what_all_of_them_share():
    layout, q = packed(2), noise(M, 2, 2, 48, 6)
    shared = noise(2, 2, 48, 6, seed=1)
    assert_same_as_in_turn(lambda *qkv: attend(*qkv, layout, 0.3), q, shared, shared, in_dims=(0, None, None))


def test_maps_within_maps_and_gradients_of_maps_are_torchs_own():
    x, weight = noise(M, 2, 4, 5), noise(M, 5, seed=1)
    twice = vmap(vmap(rms_norm, in_dims=(0, None)))(x, weight)
    torch.testing.assert_close(twice, rms_norm_naive(x, weight[:, None, None], 1e-6), rtol=0, atol=1e-12)
    mapped = grad(lambda w: vmap(rms_norm)(x, w).square().sum())(weight)
    own = weight.clone().requires_grad_()
    rms_norm_naive(x, own[:, None, None], 1e-6).square().sum().backward()
    torch.testing.assert_close(mapped, own.grad, rtol=1e-10, atol=1e-12)


def test_outside_of_a_map_nothing_is_mapped():
    x, seen = noise(M, 4), []
    assert not is_mapped(x)
    assert not at_once(x)
    vmap(lambda each: seen.append((is_mapped(x, each), at_once(each))) or each)(x)
    assert seen == [(True, True)]


def test_a_function_gets_all_members_and_may_call_what_no_rule_is_known_for():
    sizes = []

    def whole(x):
        sizes.append(tuple(x.shape))
        return x * x.sum().item()  # under the map `item` is an error

    x = noise(M, 4)
    torch.testing.assert_close(vmap(lambda each: of_all_members(whole, each))(x), x * x.sum())
    assert sizes == [(M, 4)]


def test_an_error_within_leaves_the_map_as_it_was():
    def fails(x):
        raise ValueError("no")

    def call(each):
        with pytest.raises(ValueError, match="no"):
            of_all_members(fails, each)
        return F.relu(each)

    x = noise(M, 4)
    assert torch.equal(vmap(call)(x), x.relu())


def _with_members(size, dim):
    if dim is None:
        return noise(*size, seed=3)
    return noise(M, *size, seed=3).movedim(0, dim)
