"""Every form of the correlation beside its equation, its relatives and scipy; float64, outputs and gradients.

With values that are unit vectors an output is the softmax itself, whose logarithm is the scores up to a constant a row:
so scores are tested through the whole form.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import convolve as scipy_convolve
from scipy.signal import correlate, lfilter
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from configs.errors import ConfigError
from pretrain.correlation.convolution import LONGEST, convolve_documents, convolve_seen, first_rates
from pretrain.correlation.doubling import along_diagonals, decayed_sums, doubled, later, summed_naive
from pretrain.correlation.lag import first_weights
from pretrain.correlation.lagbank import recent_products, recent_products_naive
from pretrain.layout import Layout
from pretrain.mixer import Site, make
from tests.contract.cases import noise, packed, shaken

LENGTH = 12
FORMS = {
    "lag": {"lags": 4},
    "lag by channel": {"lags": 4, "lag_channelwise": True},
    "iir": {"corr": "iir"},
    "prefix_mean": {"corr": "prefix_mean"},
    "lagbank": {"corr": "lagbank", "window": 5},
    "fft": {"corr": "fft", "n_exp": 3},
    "fft_self": {"corr": "fft_self"},
    "seed_fft": {"corr": "seed_fft"},
    "seed_ema": {"corr": "seed_ema"},
}
over_forms = pytest.mark.parametrize("name", FORMS)
LAYOUTS = {"one document": Layout.single(3, LENGTH), "packed": packed(length=LENGTH, cuts=(1, 2, 7))}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def build(name="lag", *, heads=1, width=LENGTH, positions="none", **options):
    """A mixer with random parameters."""
    options = {**FORMS[name], "heads": heads, **options}
    return shaken(make("correlation", options, Site(width, LENGTH, 0, 2, positions=positions)))


def inputs(rows=3, heads=1, width=LENGTH, length=LENGTH):
    return [noise(rows, heads, length, width, seed=seed) for seed in (11, 12, 13)]


def scores(form, q, k, layout):
    """log softmax_s S[t, s], (B, H, T, T), -inf where a query does not see a key."""
    units = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    return form(q, k, units, layout)[0].log()


def log_softmax(wanted_BHTS, layout):
    return wanted_BHTS.masked_fill(~layout.mask(), -torch.inf).log_softmax(-1)


def products(q, k, layout):
    """<q_t, k_s> / sqrt(E) inside documents, 0 elsewhere."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) * layout.mask()


def same_outputs_and_gradients(f, g, *values):
    results = []
    for function in (f, g):
        leaves = [x.clone().requires_grad_() for x in values]
        y = function(*leaves)
        grads = torch.autograd.grad((y * noise(*y.shape, seed=7)).sum(), leaves, materialize_grads=True)
        results.append([y.detach(), *grads])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def near(a, b, atol=1e-10):
    torch.testing.assert_close(a, torch.as_tensor(b), rtol=0, atol=atol)


# ---- scipy


def test_with_all_lags_and_equal_weights_the_last_row_is_scipys_cross_correlation():
    """In one dimension summed over channels, and in two dimensions at displacement 0 of channels."""
    form, (q, k, _), layout = build(lags=LENGTH).form, inputs(rows=1), Layout.single(1, LENGTH)
    with torch.no_grad():
        form.weights.fill_(1.0)
    a, b = q[0, 0].numpy(), k[0, 0].numpy()
    for full in (
        sum(correlate(a[:, c], b[:, c], "full") for c in range(LENGTH)),
        correlate(a, b, "full")[:, LENGTH - 1],
    ):
        by_key = torch.tensor(full[LENGTH - 1 :][::-1].copy()) * LENGTH**-0.5
        near(scores(form, q, k, layout)[0, 0, -1], by_key.log_softmax(-1))


def test_iir_is_scipys_filter_along_every_diagonal():
    form, (q, k, _), layout = build("iir").form, inputs(rows=1), Layout.single(1, LENGTH)
    g = form.decay.sigmoid().item()
    p, s = products(q, k, layout)[0, 0].numpy(), np.zeros((LENGTH, LENGTH))
    for tau in range(LENGTH):
        steps = np.arange(tau, LENGTH)
        s[steps, steps - tau] = lfilter([(1 - g * g) ** 0.5], [1, -g], p[steps, steps - tau])
    near(scores(form, q, k, layout), log_softmax(torch.tensor(s)[None, None], layout))


def test_fft_is_a_sum_of_scipys_filters():
    form, (q, k, v), layout = build("fft").form, inputs(rows=1), Layout.single(1, LENGTH)
    r, a = (-torch.nn.functional.softplus(form.rate)).exp().detach().numpy(), form.mix.detach().numpy()
    expected = (form.skip[:, None] * v).detach().numpy()[0, 0]
    for c in range(LENGTH):
        for n in range(3):
            gain = a[0, c, n] * (1 - r[0, c, n] ** 2) ** 0.5
            expected[:, c] += lfilter([gain], [1, -r[0, c, n]], (k * v)[0, 0, :, c].numpy())
    near(form(q, k, v, layout)[0][0, 0], q[0, 0] * torch.tensor(expected))


def test_fft_self_and_seed_fft_are_scipys_full_convolution_from_the_start_of_each_document():
    q, k, v = inputs(rows=3)
    layout = LAYOUTS["packed"]
    gated, c = torch.zeros_like(q), torch.zeros_like(q)
    for row in range(3):
        for number in layout.doc_BT[row].unique():
            here = torch.nonzero(layout.doc_BT[row] == number).flatten()
            norm = torch.arange(1, len(here) + 1).double().rsqrt()
            for channel in range(LENGTH):
                a, b, x = (t[row, 0, here, channel].numpy() for t in (q, k, v))
                gated[row, 0, here, channel] = torch.tensor(scipy_convolve(b, x, "full")[: len(here)]) * norm
                c[row, 0, here, channel] = torch.tensor(scipy_convolve(a, b, "full")[: len(here)]) * norm
    near(build("fft_self").form(q, k, v, layout)[0], q * gated + v)
    near(scores(build("seed_fft").form, q, k, layout), log_softmax(products(c, k, layout), layout))


@over_layouts
def test_seed_ema_is_attention_with_a_running_correlation_as_query(layout):
    form, (q, k, _) = build("seed_ema").form, inputs()
    g, c, steps = form.decay.sigmoid(), torch.zeros(3, 1, LENGTH, dtype=torch.float64), []
    for t in range(LENGTH):
        c = c * g * (layout.pos_BT[:, t] > 0)[:, None, None] + (q * k)[:, :, t]
        steps.append(c * (1 - g * g).sqrt())
    near(scores(form, q, k, layout), log_softmax(products(torch.stack(steps, 2), k, layout), layout))


# ---- relatives


@over_layouts
def test_iir_is_the_lagged_form_of_all_lags_with_geometric_weights(layout):
    iir, lag = build("iir").form, build(lags=LENGTH).form
    g = iir.decay.sigmoid()
    lag.weights = torch.nn.Parameter((g ** torch.arange(LENGTH) * (1 - g * g).sqrt())[None, :, None].detach())
    same_outputs_and_gradients(lambda *x: iir(*x, layout)[0], lambda *x: lag(*x, layout)[0], *inputs())


@over_layouts
def test_iir_is_the_moving_average_of_every_displacement(layout):
    """lagbank with a window of the whole row and no bias: rho_t(tau) = <q_t, k_{t-tau}> + g rho_{t-1}(tau)."""
    iir, bank = build("iir").form, build("lagbank", window=LENGTH + 3).form
    bank.decay = iir.decay
    with torch.no_grad():
        bank.bias.zero_()
    same_outputs_and_gradients(lambda *x: iir(*x, layout)[0], lambda *x: bank(*x, layout)[0], *inputs())


@over_layouts
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_with_one_lag_it_is_attention_and_has_its_parameters(layout, positions):
    site = Site(LENGTH, LENGTH, 0, 2, positions=positions)
    one, plain = build(lags=1, heads=2, positions=positions), make("attention", {"heads": 2}, site).double()
    plain.load_state_dict(one.state_dict())
    same_outputs_and_gradients(lambda x: one(x, layout)[0], lambda x: plain(x, layout)[0], noise(3, LENGTH, LENGTH))


def test_channels_of_equal_weights_are_one_weight_a_head():
    by_head, by_channel = build(heads=2), build("lag by channel", heads=2)
    by_channel.form.weights = torch.nn.Parameter(by_head.form.weights.expand(-1, -1, LENGTH // 2).detach())
    q, k, v = inputs(heads=2, width=LENGTH // 2)
    for layout in LAYOUTS.values():
        near(by_channel.form(q, k, v, layout)[0], by_head.form(q, k, v, layout)[0])


# ---- equations


@over_layouts
def test_prefix_mean_is_the_mean_over_all_times_of_the_document_of_one_displacement(layout):
    form, (q, k, _) = build("prefix_mean").form, inputs()
    p, expected = products(q, k, layout), torch.zeros(3, 1, LENGTH, LENGTH, dtype=torch.float64)
    for row in range(3):
        for t in range(LENGTH):
            start = t - int(layout.pos_BT[row, t])
            for s in range(start, t + 1):
                past = [p[row, 0, u, u - (t - s)] for u in range(start + t - s, t + 1)]
                expected[row, 0, t, s] = form.log_gain.exp() * sum(past) / len(past)
    near(scores(form, q, k, layout), log_softmax(expected, layout))


@over_layouts
def test_lagbank_is_its_equation_written_out(layout):
    form, (q, k, v) = build("lagbank").form, inputs()
    g, y = form.decay.detach().sigmoid(), form(q, k, v, layout)[0]
    for row in range(3):
        rho = torch.zeros(form.window, dtype=torch.float64)
        for t in range(LENGTH):
            pos = int(layout.pos_BT[row, t])
            count = min(form.window, pos + 1)
            for lag in range(count):
                before = g[0] * rho[lag] if lag < pos else 0.0
                rho[lag] = q[row, 0, t] @ k[row, 0, t - lag] * LENGTH**-0.5 + before
            logits = rho[:count] * (1 - g * g).sqrt() + form.bias[0].flip(0)[:count]
            past = torch.stack([v[row, 0, t - lag] for lag in range(count)])
            near(y[row, 0, t], logits.softmax(-1) @ past)


@over_layouts
@pytest.mark.parametrize("name", ["lag", "lag by channel"])
def test_lagged_scores_are_the_sum_written_out(name, layout):
    form, (q, k, _) = build(name).form, inputs()
    w, expected = form.weights.detach()[0].expand(-1, LENGTH), torch.zeros(3, 1, LENGTH, LENGTH, dtype=torch.float64)
    for row in range(3):
        for t in range(LENGTH):
            for s in range(t - int(layout.pos_BT[row, t]), t + 1):
                for lag in range(min(4, int(layout.pos_BT[row, s]) + 1)):
                    term = (w[lag] * q[row, 0, t - lag]) @ k[row, 0, s - lag]
                    expected[row, 0, t, s] += term * LENGTH**-0.5
    near(scores(form, q, k, layout), log_softmax(expected, layout))


# ---- fast forms and their plain twins


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("shift", [later, along_diagonals])
def test_doubling_equals_the_sum_of_all_terms(length, shift):
    layout = packed(length=length, cuts=(1, 2, 7))
    room = layout.pos_BT[:, None, None] if shift is along_diagonals else layout.pos_BT[:, None, :, None]
    x, keep = noise(3, 2, length, length), torch.tensor([0.3, 0.9], dtype=torch.float64).view(2, 1, 1)
    plain = lambda x, keep: summed_naive(x, keep, room, shift)  # noqa: E731
    same_outputs_and_gradients(lambda x, keep: decayed_sums(x, keep, room, shift), plain, x, keep)
    same_outputs_and_gradients(lambda x: doubled(x, 1.0, room, shift), lambda x: plain(x, 1.0), x)


def test_sums_are_the_same_where_nobody_wants_a_gradient():
    x, keep, room = noise(1, 1, 9, 3), torch.tensor(0.7, dtype=torch.float64), torch.arange(9)[None, None, :, None]
    with torch.no_grad():
        quiet = decayed_sums(x, keep, room, later)
    assert torch.equal(decayed_sums(x, keep.requires_grad_(), room, later), quiet)


@pytest.mark.parametrize(("length", "window"), [(1, 1), (1, 5), (7, 3), (12, 4), (13, 4), (9, 20), (20, 1)])
def test_products_with_recent_keys_in_blocks_equal_those_lag_by_lag(length, window):
    q, k = noise(2, 3, length, 5), noise(2, 3, length + window - 1, 5, seed=3)
    fast, plain = (lambda q, k, f=f: f(q, k, window) for f in (recent_products, recent_products_naive))
    same_outputs_and_gradients(fast, plain, q, k)


@pytest.mark.parametrize("length", [1, 2, 5, 12, 31])
@pytest.mark.parametrize("kind", ["ramps", "packed", "one document a token", "numbered from elsewhere"])
def test_documents_convolved_side_by_side_equal_the_sum_for_each_token(length, kind):
    cuts = {"one document a token": tuple(range(1, length))}.get(kind, (1, 2, 7, 20))
    layout = Layout.single(3, length) if kind == "ramps" else packed(length=length, cuts=cuts)
    if kind == "numbered from elsewhere":
        layout = Layout(layout.doc_BT + 1000, layout.pos_BT, False)
    a, b = noise(3, 2, length, 4), noise(3, 2, length, 4, seed=3)
    fast, plain = (lambda a, b, f=f: f(a, b, layout) for f in (convolve_documents, convolve_seen))
    same_outputs_and_gradients(fast, plain, a, b)


def test_the_filter_of_exponentials_by_fft_equals_its_recurrence_on_long_rows():
    form, length = build("fft", heads=2).form, 300
    layout = Layout.single(2, length)
    general = Layout(layout.doc_BT, layout.pos_BT, False)
    q, k, v = inputs(rows=2, heads=2, width=LENGTH // 2, length=length)
    same_outputs_and_gradients(lambda *x: form(*x, layout)[0], lambda *x: form(*x, general)[0], q, k, v)


# ---- promises beyond the contract


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("fft_self", "seed_fft")])
def test_on_packed_rows_it_is_causal_to_the_bit_in_fp32(name):
    """Also the filter of exponentials, which the FFT of a row of one document makes causal only up to rounding."""
    form, layout = build(name).form.float(), LAYOUTS["packed"]
    q, k, v = (x.float() for x in inputs())
    changed = [torch.cat((x[:, :, :8], 1e4 * x[:, :, 8:]), dim=2) for x in (q, k, v)]
    assert torch.equal(form(*changed, layout)[0][:, :, :8], form(q, k, v, layout)[0][:, :, :8])


@pytest.mark.parametrize("name", ["fft", "fft_self", "seed_fft"])
def test_where_an_fft_rounds_the_form_says_so_and_the_future_moves_the_past_by_rounding_alone(name):
    mix, layout = build(name), Layout.single(3, LENGTH)
    assert mix.rounding
    q, k, v = inputs()
    changed = [torch.cat((x[:, :, :8], x[:, :, 8:] + 1), dim=2) for x in (q, k, v)]
    near(mix.form(*changed, layout)[0][:, :, :8], mix.form(q, k, v, layout)[0][:, :, :8])


@pytest.mark.parametrize("name", ["fft", "fft_self", "seed_fft"])
def test_no_fft_is_computed_in_bf16(name, monkeypatch):
    seen, rfft = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, *rest, **more: seen.append(x.dtype) or rfft(x, *rest, **more))
    y, _ = build(name).form.bfloat16()(*(x.bfloat16() for x in inputs()), Layout.single(3, LENGTH))
    assert seen == [torch.float32, torch.float32]
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lag", "lag by channel", "iir", "prefix_mean", "lagbank"])
def test_with_rotary_positions_an_output_depends_on_distances_alone(name):
    """Beginning a document at position 1000 instead of 0 changes nothing but rounding."""
    form, (q, k, v), near_start = build(name, positions="rope").form, inputs(), Layout.single(3, LENGTH)

    class Far(Layout):
        def rotary(self, width, base, dtype):
            return Layout(self.doc_BT, self.pos_BT + 1000, False).rotary(width, base, dtype)

    far = Far(near_start.doc_BT, near_start.pos_BT, False)
    near(form(q, k, v, far)[0], form(q, k, v, near_start)[0])
    assert (build(name).form(q, k, v, far)[0] - form(q, k, v, far)[0]).abs().max() > 1e-3


def test_normalised_queries_and_keys_forget_their_sizes():
    mix, x, layout = build(qk_norm=True), noise(3, LENGTH, LENGTH), LAYOUTS["packed"]
    before = mix(x, layout)[0]
    with torch.no_grad():
        mix.qkv.weight[: 2 * LENGTH] *= 7
    near(mix(x, layout)[0], before, atol=1e-5)


@over_forms
@over_layouts
def test_members_run_batched_over_their_parameters_as_one_by_one(name, layout):
    members = [build(name, heads=2, qk_norm=True, positions="rope") for _ in range(2)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.mul_(0.7).add_(0.1)
    parameters, _ = stack_module_state(members)
    x = noise(2, 3, LENGTH, LENGTH)

    def loss(parameters, x):
        return functional_call(members[0], parameters, (x, layout))[0].square().sum()

    batched = vmap(grad(loss, argnums=(0, 1)))(parameters, x)
    for m, member in enumerate(members):
        alone = grad(loss, argnums=(0, 1))(dict(member.named_parameters()), x[m])
        for a, b in zip(tree_leaves(batched), tree_leaves(alone)):
            near(a[m], b)


@over_forms
def test_the_size_of_a_state_is_that_of_the_table(name):
    heads, e, t, lags, window, n_exp = 2, 6, 100, 4, 5, 3
    numbers = {
        "lag": 2 * t * e + (lags - 1) * t,
        "lag by channel": 2 * t * e + (lags - 1) * e,
        "iir": 2 * t * e + t,
        "prefix_mean": 2 * t * e + t,
        "lagbank": 2 * window * e + window,
        "fft": n_exp * e,
        "fft_self": 2 * t * e,
        "seed_fft": 3 * t * e,
        "seed_ema": 2 * t * e + e,
    }
    assert build(name, heads=heads).state_bytes(t) == 2 * heads * numbers[name]


def kept(name, layout):
    """Numbers that autograd keeps of one row for the backward pass, masks left out."""
    mix, sizes, length = build(name, heads=2), [], layout.pos_BT.shape[1]
    q, k, v = (x.requires_grad_() for x in inputs(rows=1, heads=2, width=6, length=length))
    note = lambda x: sizes.append(x.numel() * (x.dtype != torch.bool)) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        mix.form(q, k, v, layout)
    return sum(sizes)


@pytest.mark.parametrize("name", ["iir", "prefix_mean"])
def test_a_dense_form_keeps_a_few_matrices_of_the_row_however_many_steps_its_sums_take(name):
    assert build(name).dense
    assert kept(name, Layout.single(1, 256)) < 4.1 * kept(name, Layout.single(1, 128))
    assert kept(name, Layout.single(1, 256)) < 6 * 2 * 256**2


@pytest.mark.parametrize("name", ["lagbank", "fft", "fft_self"])
@pytest.mark.parametrize("layout", [Layout.single, packed])
def test_other_forms_keep_what_grows_with_the_length_and_at_most_its_logarithm(name, layout):
    assert not build(name).dense
    assert kept(name, layout(1, 256)) < 2.4 * kept(name, layout(1, 128))


@over_forms
def test_nothing_of_a_form_decays(name):
    mix = build(name)
    names = {name for group in mix.param_groups() for name in group.names if not group.decay}
    assert names == {f"form.{n}" for n, _ in mix.form.named_parameters()}


@pytest.mark.parametrize("kind", ["geometric", "uniform", "delta"])
def test_weights_of_lags_begin_with_norm_1(kind):
    near(first_weights(kind, 3, 5).norm(dim=1), torch.ones(3), atol=1e-6)
    assert first_weights(kind, 3, 5)[:, 0].min() > 0


def test_exponentials_begin_with_memories_of_one_token_to_a_thousand():
    memory = 1 / torch.nn.functional.softplus(first_rates(8).double())
    near(memory[[0, -1]], torch.tensor([1.0, LONGEST], dtype=torch.float64), atol=1e-3)
    ratio = memory[1:] / memory[:-1]
    near(ratio, torch.full_like(ratio, LONGEST ** (1 / 7)), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"corr": "iir", "lags": 4}, "lags does not belong to corr iir, which has no options of its own; remove it"),
        ({"corr": "lag", "n_exp": 4}, "n_exp does not belong to corr lag, which takes lags, lag_init, lag_channelwise"),
        ({"window": 4}, "window does not belong to corr lag"),
        ({"corr": "lagbank", "window": 0}, "window is 0; it must be > 0"),
        ({"corr": "seed"}, "corr is 'seed', not one of lag, iir, prefix_mean, lagbank, fft"),
        ({"corr": "fft", "lag_channelwise": False}, "lag_channelwise does not belong to corr fft, which takes n_exp"),
        ({"corr": "fft_self", "rope_base": 1e4}, "rope_base does not belong to corr fft_self, which rotates nothing"),
    ],
)  # fmt: skip
def test_an_option_of_another_form_is_told_in_one_sentence(options, told):
    with pytest.raises(ConfigError, match=told) as error:
        make("correlation", options, Site(LENGTH, LENGTH, 0, 2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("corr", ["fft", "fft_self"])
def test_what_is_not_rotated_may_have_heads_of_odd_width(corr):
    assert make("correlation", {"corr": corr, "heads": 4}, Site(12, LENGTH, 0, 2)).head_width == 3
    with pytest.raises(ConfigError, match="heads of width 3 cannot be rotated"):
        make("correlation", {"heads": 4}, Site(12, LENGTH, 0, 2))
