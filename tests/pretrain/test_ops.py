"""Every fast form beside its plain twin: outputs and gradients, float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.batch import IGNORE
from pretrain.layout import Layout
from pretrain.ops import attention
from pretrain.ops.attention import attend, attend_naive
from pretrain.ops.lags import lag_scores, stack_keys, stack_plain, stack_queries
from pretrain.ops.loss import cross_entropy, cross_entropy_naive
from pretrain.ops.norm import rms_norm, rms_norm_naive
from pretrain.ops.rotary import Rotary, rotate_real
from tests.contract.cases import noise, packed


def both(f, g, *inputs):
    """Outputs and gradients of two functions of the same inputs."""
    results = []
    for function in (f, g):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        (y * noise(*y.shape, seed=7)).sum().backward()
        results.append([y.detach(), *(x.grad for x in leaves)])
    return zip(*results)


@pytest.mark.parametrize("shape", [(7,), (3, 5, 16), (2, 3, 4, 33)])
def test_rms_norm_equals_its_equation(shape):
    x, w = noise(*shape), noise(shape[-1], seed=3)
    for a, b in both(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_naive(x, w, 1e-6), x, w):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rms_norm_survives_a_zero_vector():
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4)).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("chunk", [1, 11, 13 * 11, 10**6])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_in_chunks_equals_the_whole(chunk, bias):
    x, w, b = noise(40, 8), noise(11, 8, seed=3), noise(11, seed=4) if bias else None
    targets = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(0))
    targets[::7] = IGNORE
    inputs = (x, w) if b is None else (x, w, b)
    fast = lambda x, w, b=None: cross_entropy(x, w, b, targets, chunk)[0][None]  # noqa: E731
    plain = lambda x, w, b=None: cross_entropy_naive(x, w, b, targets).sum()[None]  # noqa: E731
    for got, expected in both(fast, plain, *inputs):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    per_token = cross_entropy(*inputs, *([None] if b is None else []), targets, chunk)[1]
    torch.testing.assert_close(per_token, cross_entropy_naive(x, w, b, targets))
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, w, b, targets, chunk)[1], per_token)


def test_cross_entropy_keeps_no_logits():
    """What the backward pass needs is as large as the gradients, not as tokens times vocabulary."""
    x, w = torch.randn(256, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cross_entropy(x, w, None, torch.zeros(256, dtype=torch.long), chunk_elements=4096 * 16)
    assert max(kept) <= w.numel()


def test_cross_entropy_is_finite_for_huge_logits():
    x, w = torch.full((2, 4), 1e3), torch.eye(4) * 1e3
    total, _ = cross_entropy(x.requires_grad_(), w, None, torch.tensor([0, 1]))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(x.grad).all()


def test_rotation_in_complex_numbers_equals_the_real_form():
    rotary = Rotary.of(torch.arange(20)[None], 16, 1e4, torch.float64)
    assert rotary.phase is not None
    for a, b in both(rotary.rotate, lambda x: rotate_real(x, rotary.cos, rotary.sin), noise(2, 3, 20, 16)):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_products_of_rotated_vectors_depend_on_distances_alone():
    q, k = noise(1, 1, 12, 8), noise(1, 1, 12, 8, seed=3)
    scores = []
    for shift in (0, 1000):
        rotary = Rotary.of(torch.arange(12)[None] + shift, 8, 1e4, torch.float64)
        scores.append(rotary.rotate(q) @ rotary.rotate(k).transpose(-1, -2))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-11)


def test_rotation_turns_pairs_by_the_stated_angle():
    rotary = Rotary.of(torch.tensor([[3]]), 4, 100.0, torch.float64)
    turned = rotary.rotate(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)).flatten()
    angle = torch.tensor([3.0, 3.0 * 100.0**-0.5], dtype=torch.float64)
    torch.testing.assert_close(turned, torch.stack((angle.cos(), angle.sin()), -1).flatten())


@pytest.mark.parametrize(("kv_heads", "width"), [(4, 8), (2, 8), (1, 8), (4, 3)])
@pytest.mark.parametrize("layout", [Layout.single(3, 48), packed()], ids=["ramps", "packed"])
@pytest.mark.parametrize("explicit_bytes", [0, 1 << 30])
def test_attention_equals_its_equation(kv_heads, width, layout, explicit_bytes, monkeypatch):
    monkeypatch.setattr(attention, "_EXPLICIT_BYTES", explicit_bytes)
    q, k, v = noise(3, 4, 48, 8), noise(3, kv_heads, 48, 8, seed=3), noise(3, kv_heads, 48, width, seed=4)
    fast = lambda q, k, v: attend(q, k, v, layout, 0.3)  # noqa: E731
    plain = lambda q, k, v: attend_naive(q, k, v, layout.mask(), 0.3)  # noqa: E731
    for a, b in both(fast, plain, q, k, v):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lags", [1, 2, 4, 60])
@pytest.mark.parametrize("layout", [Layout.single(3, 48), packed()], ids=["ramps", "packed"])
def test_stacked_lags_give_the_scores_of_the_equation(lags, layout):
    q, k, w = noise(3, 2, 48, 6), noise(3, 2, 48, 6, seed=3), noise(2, lags, seed=4)

    def fast(q, k, w):
        product = stack_queries(q, w[..., None], lags) @ stack_keys(k, lags, layout).transpose(-1, -2)
        return product.masked_fill(~layout.mask(), 0.0)

    def plain(q, k, w):
        rows = F.pad(q @ k.transpose(-1, -2), (0, 0, lags - 1, 0))
        return lag_scores(rows, w, layout.pos_BT, layout.pos_BT).masked_fill(~layout.mask(), 0.0)

    for a, b in both(fast, plain, q, k, w):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("layout", [Layout.single(3, 48), packed()], ids=["ramps", "packed"])
def test_stacked_lags_are_the_composed_ones_of_one_model_and_of_all_members_at_once(layout, width):
    x, w = noise(5, 3, 2, 48, 6), noise(5, 2, 4, width, seed=3)

    def fast(x, w):
        return torch.cat((stack_queries(x, w, 4), stack_keys(x, 4, layout)), dim=-1)

    def plain(x, w):
        return torch.cat((stack_plain(x, w[:, :, None]), stack_plain(x, layout.reaches_each(4))), dim=-1)

    for member in range(5):
        for got, expected in both(fast, plain, x[member], w[member]):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    in_turn = lambda x, w: torch.stack([plain(*each) for each in zip(x, w)])  # noqa: E731
    for got, expected in both(torch.func.vmap(fast), in_turn, x, w):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    one = lambda x: torch.stack([plain(each, w[0]) for each in x])  # noqa: E731
    for got, expected in both(torch.func.vmap(lambda x: fast(x, w[0])), one, x):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_lag_scores_equal_the_sum_written_out():
    q, k, w = noise(1, 1, 9, 4), noise(1, 1, 9, 4, seed=3), noise(1, 3, seed=4)
    layout = Layout.single(1, 9)
    rows = F.pad(q @ k.transpose(-1, -2), (0, 0, 2, 0))
    got = lag_scores(rows, w, layout.pos_BT, layout.pos_BT)[0, 0]
    for t in range(9):
        for s in range(t + 1):
            expected = sum(w[0, lag] * (q[0, 0, t - lag] @ k[0, 0, s - lag]) for lag in range(3) if s - lag >= 0)
            torch.testing.assert_close(got[t, s], expected)


def test_with_all_lags_and_equal_weights_the_last_row_is_scipys_cross_correlation():
    """Mixers page 1.4: S[T-1, T-1-tau] is the full correlation of q and k at displacement tau, summed over channels."""
    from scipy.signal import correlate

    length, width = 24, 5
    q, k = noise(1, 1, length, width), noise(1, 1, length, width, seed=3)
    layout = Layout.single(1, length)
    rows = F.pad(q @ k.transpose(-1, -2), (0, 0, length - 1, 0))
    scores = lag_scores(rows, torch.ones(1, length, dtype=torch.float64), layout.pos_BT, layout.pos_BT)[0, 0]
    expected = sum(correlate(q[0, 0, :, c].numpy(), k[0, 0, :, c].numpy(), "full") for c in range(width))
    for tau in range(length):
        assert scores[-1, length - 1 - tau].item() == pytest.approx(expected[length - 1 + tau], abs=1e-12)
