"""Involution: the banded form against its equation, and the special cases that are something else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from configs.errors import ConfigError
from pretrain import mixer
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.mixer import Site
from pretrain.ops.involution import involution, involution_naive
from tests.contract.cases import LENGTH, ROWS, WIDTH, make_mixer, make_model, noise, packed, tokens
from tests.pretrain.test_ops import both

GROUPS = WIDTH // 16


def fixed_kernel(mix, kernel_GK):
    """Make the generator give the same kernel at every token."""
    mix.kernel = torch.nn.Linear(mix.kernel.in_features, kernel_GK.numel(), dtype=torch.float64)
    with torch.no_grad():
        mix.kernel.weight.zero_()
        mix.kernel.bias.copy_(kernel_GK.flatten())


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("taps", [1, 2, 7, 32])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_the_banded_form_equals_the_equation_in_outputs_and_gradients(length, taps, dilation):
    kernel, v = noise(2, length, 3, taps), noise(2, length + (taps - 1) * dilation, 3, 4, seed=3)
    for a, b in both(lambda *x: involution(*x, dilation), lambda *x: involution_naive(*x, dilation), kernel, v):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_constant_kernel_is_a_depthwise_causal_convolution_shared_within_a_group():
    mix, x, kernel = (
        make_mixer("involution", {"kernel": 6, "delta": True}),
        noise(ROWS, LENGTH, WIDTH),
        noise(GROUPS, 6),
    )
    fixed_kernel(mix, kernel)
    taps = kernel.repeat_interleave(WIDTH // GROUPS, dim=0).flip(-1)[:, None]
    v = F.pad(mix.value(x).transpose(1, 2), (5, 0))
    expected = mix.out(F.conv1d(v, taps, groups=WIDTH).transpose(1, 2))
    torch.testing.assert_close(mix(x, Layout.single(ROWS, LENGTH))[0], expected, rtol=0, atol=1e-13)


def test_one_tap_is_a_gate_on_each_token():
    mix, x, layout = make_mixer("involution", {"kernel": 1}), noise(ROWS, LENGTH, WIDTH), packed()
    gate = mix.kernels(x, layout).expand(-1, -1, -1, WIDTH // GROUPS).flatten(2)
    torch.testing.assert_close(mix(x, layout)[0], mix.out(gate * mix.value(x)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
def test_it_is_the_sum_that_its_file_states_document_by_document(softmax, dilation):
    options = {"kernel": 5, "dilation": dilation, "softmax": softmax, "groups": 4}
    mix, x, layout = make_mixer("involution", options), noise(ROWS, LENGTH, WIDTH), packed()
    z = mix.squeeze(x)
    z = torch.relu(z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    kernel, v = mix.kernel(z).unflatten(-1, (4, 5)), mix.value(x).unflatten(-1, (4, 8))
    kernel = kernel.softmax(-1) if softmax else kernel
    y = torch.zeros_like(v)
    for row in range(ROWS):
        for t in range(LENGTH):
            for k in range(5):
                if layout.pos_BT[row, t] >= k * dilation:
                    y[row, t] += kernel[row, t, :, k, None] * v[row, t - k * dilation]
    torch.testing.assert_close(mix(x, layout)[0], mix.out(y.flatten(2)), rtol=0, atol=1e-12)


def test_softmax_kernels_are_positive_and_sum_to_one():
    kernel = make_mixer("involution", {"softmax": True}).kernels(noise(2, 9, WIDTH), Layout.single(2, 9))
    assert kernel.min() > 0
    torch.testing.assert_close(kernel.sum(-1), torch.ones_like(kernel[..., 0]))


@pytest.mark.parametrize(("taps", "dilation"), [(4, 1), (4, 3), (1, 1)])
def test_a_layer_sees_its_taps_and_nothing_between_or_beyond_them(taps, dilation):
    mix, x = make_mixer("involution", {"kernel": taps, "dilation": dilation}), noise(1, LENGTH, WIDTH).requires_grad_()
    (grad,) = torch.autograd.grad(mix(x, Layout.single(1, LENGTH))[0][0, 30].square().sum(), x)
    seen = grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == sorted(30 - k * dilation for k in range(taps))


@pytest.mark.parametrize(
    ("options", "reach"), [({"kernel": 4}, 2 * 3), ({"kernel": 4, "dilation": 2, "dilation_growth": 3}, 3 * (2 + 6))]
)
def test_two_layers_reach_the_sum_of_their_reaches(options, reach):
    model, layout, ids = make_model("involution", options, positions="none"), Layout.single(1, LENGTH), tokens(rows=1)
    last = model.logits(ids, layout)[0, -1]
    for back in (reach, reach + 1):
        changed = ids.clone()
        changed[0, -1 - back] = (ids[0, -1 - back] + 1) % 61
        differs = not torch.equal(model.logits(changed, layout)[0, -1], last)
        assert differs == (back == reach)


@pytest.mark.parametrize(
    ("options", "length", "dilations"),
    [
        ({"kernel": 32}, 256, [1, 1, 1, 1]),
        ({"kernel": 8, "dilation": 3}, 256, [3, 3, 3, 3]),
        ({"kernel": 8, "dilation_growth": 2}, 64, [1, 2, 4, 8, 1, 2]),
        ({"kernel": 8, "dilation_growth": 2}, 56, [1, 2, 4, 1]),
        ({"kernel": 1, "dilation_growth": 4}, 16, [1, 4, 1]),
        ({"kernel": 99, "dilation_growth": 2}, 16, [1, 1]),
    ],
)
def test_the_dilation_grows_with_the_layer_while_a_kernel_fits_a_row(options, length, dilations):
    made = [mixer.make("involution", options, Site(32, length, layer, 8)) for layer in range(len(dilations))]
    assert [mix.dilation for mix in made] == dilations


def test_kernels_begin_small_and_a_delta_one_larger_on_the_token_itself():
    for delta in (False, True):
        mix = mixer.make("involution", {"delta": delta}, Site(64, 128, 0, 2))
        initialise(mix, 0)
        kernel = mix.kernels(noise(8, 128, 64).float(), Layout.single(8, 128))
        identity = torch.zeros(32).index_fill(0, torch.tensor(0), float(delta))
        # the mean square of relu(norm) is a half
        assert (kernel - identity).square().mean().item() == pytest.approx(0.02**2 * 16 / 2, rel=0.2)


def test_values_are_not_kept_once_for_every_tap():
    kernel, v = torch.randn(2, 256, 8, 32, requires_grad=True), torch.randn(2, 256 + 31, 8, 16, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.untyped_storage()._cdata, t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        y = involution(kernel, v)
    assert sum(kept.values()) < 8 * 4 * y.numel()


def test_groups_that_do_not_divide_the_width_are_refused_with_the_nearest_that_do():
    with pytest.raises(ConfigError, match="not a multiple of 5 groups; the nearest that fits is 4"):
        mixer.make("involution", {"groups": 5}, Site(32, 16, 0, 1))


@pytest.mark.parametrize(("width", "groups"), [(4, 1), (16, 1), (40, 2), (56, 2), (64, 4), (800, 50)])
def test_without_a_choice_groups_have_about_sixteen_channels(width, groups):
    assert mixer.make("involution", {}, Site(width, 16, 0, 1)).groups == groups


def test_many_members_run_at_once():
    members, x, layout = (
        [make_mixer("involution", {"kernel": 5, "dilation": 2}) for _ in range(3)],
        noise(3, 2, 20, WIDTH),
        packed(2, 20),
    )
    for i, member in enumerate(members):
        for p in member.parameters():
            p.data += 0.1 * i
    params, _ = torch.func.stack_module_state(members)
    together = torch.func.vmap(lambda p, x: torch.func.functional_call(members[0], p, (x, layout))[0])(params, x)
    alone = torch.stack([member(row, layout)[0] for member, row in zip(members, x)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_a_narrow_model_still_learns_its_kernels():
    mix = mixer.make("involution", {}, Site(4, 16, 0, 1)).double()
    initialise(mix, 0)
    x = noise(2, 16, 4)
    (mix(x, Layout.single(2, 16))[0] * noise(2, 16, 4, seed=1)).sum().backward()
    assert mix.squeeze.weight.grad.norm() > 1e-4 * mix.kernel.weight.grad.norm()
