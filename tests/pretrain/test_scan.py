"""Softmax means of all prefixes: blocks of matrices against one token after the other, and what must not break."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from pretrain.layout import Layout
from pretrain.ops.blocks import even_blocks
from pretrain.ops.scan import empty_prefix, prefix_softmax, prefix_softmax_naive, running_max
from tests.contract.cases import noise, packed, piece

ROWS, HEADS, WIDTH = 3, 2, 5
PLAIN = Layout.single


def case(length, layout=None, size=4.0):
    layout = layout or PLAIN(ROWS, length)
    logits, v = size * noise(ROWS, HEADS, length), noise(ROWS, HEADS, length, WIDTH, seed=3)
    return logits, v, layout.pos_BT, empty_prefix(ROWS, HEADS, WIDTH, v)


def run(scan, logits, v, pos, state):
    """Everything that comes out, and the gradients of all of it by everything that goes in."""
    leaves = [x.clone().requires_grad_() for x in (logits, v, state.sums)]
    out = scan(leaves[0], leaves[1], pos, state._replace(sums=leaves[2]))
    results = [out.mean_BHTV, out.lse_BHT, out.state.sums]
    sum((y * noise(*y.shape, seed=7 + i)).sum() for i, y in enumerate(results)).backward()
    return [*(y.detach() for y in results), out.state.top, *(x.grad for x in leaves)]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("cuts", [(), (1, 2, 17, 18, 40), (32, 64), (31, 33, 34, 65)])
def test_the_blocks_equal_one_token_after_the_other_in_outputs_and_gradients(length, cuts):
    inputs = case(length, packed(ROWS, length, cuts))
    for got, expected in zip(run(prefix_softmax, *inputs), run(prefix_softmax_naive, *inputs)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scan", [prefix_softmax, prefix_softmax_naive])
def test_a_mean_is_the_softmax_written_out(scan):
    layout = packed(ROWS, 90)
    logits, v, pos, state = case(90, layout)
    past = scan(logits, v, pos, state)
    scores = logits[:, :, None].expand(-1, -1, 90, -1).masked_fill(~layout.mask(), -torch.inf)
    torch.testing.assert_close(past.mean_BHTV, scores.softmax(-1) @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(past.lse_BHT, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1,), (5, 6), (32,), (30, 100)])
def test_a_state_carries_a_stream_on_where_it_ended(cuts):
    layout, length = packed(ROWS, 150, (1, 2, 17, 18, 40, 99)), 150
    logits, v, pos, state = case(length, layout)
    whole, parts = prefix_softmax(logits, v, pos, state), []
    for start, stop in zip((0, *cuts), (*cuts, length)):
        here = piece(layout, start, stop).pos_BT
        past = prefix_softmax(logits[:, :, start:stop], v[:, :, start:stop], here, state)
        state = past.state
        parts.append(past.mean_BHTV)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole.mean_BHTV, rtol=1e-12, atol=1e-12)
    for got, expected in zip(state, whole.state):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scan", [prefix_softmax, prefix_softmax_naive])
@pytest.mark.parametrize("at", [50, 70])
def test_one_huge_logit_leaves_every_row_before_it_as_it_was_and_finite_in_fp32(scan, at):
    """A maximum over the whole row would make the sums before it underflow, and so let the future be seen."""
    logits, v, pos, state = tree_map(lambda x: x if x.dtype == torch.long else x.float(), case(100))
    huge = logits.clone().requires_grad_()
    with torch.no_grad():
        huge[:, :, at] += 130
    calm, storm = scan(logits, v, pos, state), scan(huge, v, pos, state)
    assert torch.equal(storm.mean_BHTV[:, :, :at], calm.mean_BHTV[:, :, :at])
    assert torch.equal(storm.lse_BHT[:, :, :at], calm.lse_BHT[:, :, :at])
    torch.testing.assert_close(storm.mean_BHTV[:, :, at:], v[:, :, at : at + 1].expand(-1, -1, 100 - at, -1))
    (storm.mean_BHTV.sum() + storm.lse_BHT.sum()).backward()
    assert torch.isfinite(huge.grad).all()


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_far_from_zero_change_nothing_but_the_lse(shift):
    logits, v, pos, state = case(100)
    near, far = prefix_softmax(logits, v, pos, state), prefix_softmax(logits + shift, v, pos, state)
    torch.testing.assert_close(far.mean_BHTV, near.mean_BHTV, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(far.lse_BHT - shift, near.lse_BHT, rtol=1e-10, atol=1e-10)


def test_the_document_before_leaves_no_trace_however_large_it_was():
    layout = packed(ROWS, 100, (40,))
    logits, v, pos, state = tree_map(lambda x: x if x.dtype == torch.long else x.float(), case(100, layout))
    loud = torch.where(layout.doc_BT[:, None] == 0, logits + 300, logits)
    calm, storm = prefix_softmax(logits, v, pos, state), prefix_softmax(loud, v, pos, state)
    after = (layout.doc_BT > 0)[:, None, :, None]
    assert torch.equal(storm.mean_BHTV * after, calm.mean_BHTV * after)


def test_a_running_maximum_is_that_of_its_document_so_far():
    layout, x = packed(ROWS, 70), noise(ROWS, HEADS, 70)
    seen = x[:, :, None].expand(-1, -1, 70, -1).masked_fill(~layout.mask(), -torch.inf)
    before = torch.full((ROWS, HEADS), 9.0, dtype=torch.float64)
    assert torch.equal(running_max(x, layout.pos_BT, before), seen.amax(-1))
    assert torch.equal(running_max(x, layout.pos_BT + 70, before), torch.full_like(x, 9.0))


def test_long_rows_keep_few_numbers_for_the_backward_pass():
    """Linear in the length: at twice the length, twice as much."""
    kept = {}
    for length in (512, 1024):
        logits, v, pos, state = case(length)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.__setitem__(t.untyped_storage()._cdata, t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            prefix_softmax(logits.requires_grad_(), v.requires_grad_(), pos, state)
        kept[length] = sum(sizes.values())
    assert kept[1024] < 2.1 * kept[512]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 48, 65, 96, 1000])
def test_blocks_cover_a_row_and_waste_less_than_a_token_each(length):
    count, size = even_blocks(length, 32)
    assert size <= 32
    assert length <= count * size < length + count


def test_many_members_run_at_once():
    pos, state = packed(ROWS, 70).pos_BT, empty_prefix(ROWS, HEADS, WIDTH, noise(1))
    logits, v = noise(4, ROWS, HEADS, 70), noise(4, ROWS, HEADS, 70, WIDTH, seed=3)
    together = torch.func.vmap(lambda *x: prefix_softmax(*x, pos, state).mean_BHTV)(logits, v)
    alone = torch.stack([prefix_softmax(*member, pos, state).mean_BHTV for member in zip(logits, v)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
