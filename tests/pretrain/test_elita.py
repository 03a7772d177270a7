"""ELiTA's Attention2: the linear form against the softmax written out, and what follows from its score."""

from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from configs.load import find, load
from pretrain import mixer
from pretrain.config import RunConfig
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.mixer import Site
from tests.contract.cases import LENGTH, ROWS, WIDTH, make_mixer, noise, packed

OPTIONS = [{}, {"heads": 2, "value_width": 5, "features": 3}, {"heads": 3, "value_width": 4, "pos_scale": 7.0}]
over_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def scores(mix, x, layout):
    """S (B, H, T, T) before any mask, and the own column s (B, H, T), term by term as the equations are published."""
    k1, k2, k3 = mix.scores.weight.unflatten(0, (3, mix.heads))
    place = layout.pos_BT[..., None, None].double() / mix.pos_scale
    p1, p2 = (torch.sin(place * rate + offset) for rate, offset in zip(mix.rate, mix.offset))
    as_key = torch.einsum("bthp,hp->bht", p1, mix.amplitude)[:, :, None, :]
    as_query = torch.einsum("bthp,hp->bht", p2, mix.amplitude)[..., None]
    keys, queries = (torch.einsum("btd,hd->bht", x, k) for k in (k1, k3))
    return keys[:, :, None, :] + queries[..., None] + as_key + as_query, torch.einsum("btd,hd->bht", x, k2)


def dense(mix, x, layout):
    """softmax over T columns and the own one."""
    score, own = scores(mix, x, layout)
    v = mix.value(x).unflatten(-1, (mix.heads, -1)).transpose(1, 2)
    weights = torch.cat((score.masked_fill(~layout.mask(), -torch.inf), own[..., None]), dim=-1).softmax(-1)
    y = weights[..., :-1] @ v + weights[..., -1:] * v
    return mix.out(y.transpose(1, 2).flatten(2))


@over_options
@pytest.mark.parametrize("cuts", [(), (1, 2, 17, 18, 40)])
def test_it_is_a_dense_softmax_over_the_past_and_the_token_once_more(options, cuts):
    mix, x, layout = make_mixer("elita", options), noise(ROWS, LENGTH, WIDTH), packed(cuts=cuts)
    results = []
    for form in (lambda x: mix(x, layout)[0], lambda x: dense(mix, x, layout)):
        mix.zero_grad()
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        (y * noise(*y.shape, seed=5)).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in mix.parameters())])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_every_query_gives_the_past_the_same_relative_weights():
    """Read off as outputs whose values say which token they are."""
    mix, x = make_mixer("elita", {"heads": 1, "value_width": LENGTH}), noise(1, LENGTH, WIDTH)
    mix.value.register_forward_hook(lambda *_: torch.eye(LENGTH, dtype=x.dtype)[None])
    mix.out = torch.nn.Identity()
    weights_TT = mix(x, Layout.single(1, LENGTH))[0][0]
    against_first = (weights_TT / weights_TT[:, :1]).log()
    for i in range(2, LENGTH):
        torch.testing.assert_close(against_first[i, :i], against_first[-1, :i], rtol=0, atol=1e-11)
    assert against_first[-1, 1:-1].std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_key_in_the_future_leaves_every_row_before_it_as_it_was_and_finite(dtype):
    mix, x, layout = make_mixer("elita", {}).to(dtype), noise(1, 100, WIDTH).to(dtype), Layout.single(1, 100)
    changed = x.clone()
    k1 = mix.scores.weight[0]
    changed[:, 80] = 130 * k1 / k1.float().square().sum().to(dtype)
    assert mix.scores(changed)[0, 80, 0].item() == pytest.approx(130, rel=0.02)
    before, after = mix(x, layout)[0], mix(changed, layout)[0]
    assert torch.equal(before[:, :80], after[:, :80])
    assert torch.isfinite(after).all()
    assert not torch.equal(before[:, 80:], after[:, 80:])


def test_long_rows_in_bf16_are_summed_up_in_fp32():
    """A sum of 4,096 equal weights would stop growing at 256 in bf16."""
    mix, x = make_mixer("elita", {"heads": 1}).bfloat16(), torch.ones(1, 4096, WIDTH, dtype=torch.bfloat16)
    torch.nn.init.zeros_(mix.amplitude)
    _, state = mix(x, Layout.single(1, 4096), mix.initial_state(1, x))
    assert state.sums[0, 0, -1].item() == 4096


def test_the_state_does_not_grow():
    mix, x = make_mixer("elita", {}), noise(1, 40, WIDTH)
    _, state = mix(x, Layout.single(1, 40), mix.initial_state(1, x))
    assert [tuple(t.shape) for t in state] == [(1, 4), (1, 4, WIDTH // 4 + 1)]


def test_positions_are_divided_by_the_length_of_a_training_row_or_as_said():
    assert mixer.make("elita", {}, Site(32, 77, 0, 1)).pos_scale == 77
    assert mixer.make("elita", {"pos_scale": 5.0}, Site(32, 77, 0, 1)).pos_scale == 5


def test_parameters_number_what_the_equations_say_and_half_of_attentions():
    options = {"heads": 4, "features": 16, "value_width": 16}
    for bias in (False, True):
        made = mixer.make("elita", options, Site(64, 256, 0, 3, bias=bias))
        assert sum(p.numel() for p in made.parameters()) == 9_280


def test_the_first_values_are_the_published_ones():
    mix = mixer.make("elita", {}, Site(512, 256, 0, 3))
    initialise(mix, 0)
    for p in (mix.scores.weight, mix.rate, mix.offset, mix.amplitude):
        assert 0.04 < p.abs().max().item() <= 0.05
    # glorot over all heads' values together, a square matrix
    assert mix.value.weight.std().item() == pytest.approx((2 / (512 + 512)) ** 0.5, rel=0.02)


def test_heads_of_odd_width_are_allowed_and_heads_that_do_not_divide_the_width_refused():
    assert mixer.make("elita", {"heads": 4}, Site(12, 16, 0, 1)).value_width == 3
    with pytest.raises(ConfigError, match="not a multiple of 5 heads"):
        mixer.make("elita", {"heads": 5}, Site(32, 16, 0, 1))


def test_the_preset_is_the_published_block():
    model = load(RunConfig, [find("models/elita")]).model
    assert (model.width, model.depth, model.norm, model.positions, model.tie) == (
        64,
        3,
        "layernorm_plain",
        "none",
        True,
    )
    assert (model.mixers[0].name, model.channel.name) == ("elita", "feedforward2")


def test_many_members_run_at_once():
    members, x, layout = [make_mixer("elita", {}) for _ in range(3)], noise(3, 2, 20, WIDTH), packed(2, 20)
    for i, member in enumerate(members):
        for p in member.parameters():
            p.data += 0.1 * i
    params, _ = torch.func.stack_module_state(members)
    together = torch.func.vmap(lambda p, x: torch.func.functional_call(members[0], p, (x, layout))[0])(params, x)
    alone = torch.stack([member(row, layout)[0] for member, row in zip(members, x)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
