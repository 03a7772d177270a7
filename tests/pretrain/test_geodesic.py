"""Motion in a curved space beside its equations, and the stack that is made of it."""

from __future__ import annotations

import pytest
import torch

from configs.load import Layers
from configs.load import build as checked
from pretrain.config import ModelConfig
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.ops.geodesic import Space, acceleration_naive, rk4, semi_implicit, woodbury
from tests.contract.cases import noise, packed, shaken, tokens
from tests.pretrain.test_ops import both

WIDTH, RANK, FEATURES = 6, 2, 5
METHODS = pytest.mark.parametrize("method", [rk4, semi_implicit])


def matrices(size=1.0, width=WIDTH):
    w, c = noise(FEATURES, width, seed=1), noise(FEATURES, seed=2)
    p, p0 = noise(width, FEATURES, seed=3), noise(width, seed=4)
    return w, c, size * p, p0, size * noise(width * RANK, FEATURES, seed=5), noise(width * RANK, seed=6)


def moved(method, space, x, v, steps, time=1.0):
    for _ in range(steps):
        x, v = method(space.acceleration, (x, v), time / steps)
    return x, v


def test_the_acceleration_equals_that_of_explicit_christoffel_symbols_in_values_and_gradients():
    def fast(x, v, *weights):
        return Space(*weights).acceleration(x, v)

    def plain(x, v, *weights):
        return torch.stack([acceleration_naive(Space(*weights), a, b) for a, b in zip(x, v)])

    for a, b in both(fast, plain, noise(3, WIDTH), noise(3, WIDTH, seed=9), *matrices(0.5)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_acceleration_equals_one_jvp_and_one_vjp_of_the_metric():
    space, x, v = Space(*matrices(0.5)), noise(1, WIDTH), noise(1, WIDTH, seed=9)

    def lowered(x):
        d, u = space.metric(x)
        return d * v + (u @ (v[:, None] @ u).mT).squeeze(-1)

    along = torch.func.jvp(lowered, (x,), (v,))[1]
    upward = torch.func.grad(lambda x: space.energy(x, v).sum())(x) / 2
    torch.testing.assert_close(space.acceleration(x, v), woodbury(*space.metric(x), upward - along))


def test_the_inverse_by_ranks_is_the_inverse():
    d, u, y = noise(4, 7).square() + 0.1, noise(4, 7, 3, seed=3), noise(4, 7, seed=4)
    torch.testing.assert_close(woodbury(d, u, y), torch.linalg.solve(torch.diag_embed(d) + u @ u.mT, y))


@METHODS
def test_in_a_constant_metric_motion_is_a_straight_line(method):
    space, x, v = Space(*matrices(0.0)), noise(3, WIDTH), noise(3, WIDTH, seed=9)
    end, speed = moved(method, space, x, v, steps=3)
    torch.testing.assert_close(end, x + v, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(speed, v, rtol=1e-14, atol=1e-14)


def test_the_energy_of_a_motion_is_kept():
    """To 1e-6 in three steps of fourth order where space bends gently, as in the prototype."""
    space, x, v = Space(*matrices(0.05)), noise(5, WIDTH) / 4, noise(5, WIDTH, seed=9) / 8
    end, speed = moved(rk4, space, x, v, steps=3)
    torch.testing.assert_close(space.energy(end, speed), space.energy(x, v), rtol=1e-6, atol=0)
    assert ((space.energy(x, speed) / space.energy(x, v)) - 1).abs().min() > 1e-4, "a straight line shows nothing"


@pytest.mark.parametrize(("method", "order"), [(rk4, 4), (semi_implicit, 1)])
def test_halving_the_step_divides_the_error_by_the_methods_order(method, order):
    space, x, v = Space(*matrices(0.3)), noise(4, WIDTH), 0.3 * noise(4, WIDTH, seed=9)
    true = torch.cat(moved(rk4, space, x, v, steps=512))
    errors = [(torch.cat(moved(method, space, x, v, steps=n)) - true).norm().item() for n in (32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


def test_a_geodesic_run_backwards_comes_home():
    space, x, v = Space(*matrices(0.3)), noise(4, WIDTH), 0.3 * noise(4, WIDTH, seed=9)
    there, speed = moved(rk4, space, x, v, steps=256)
    home, _ = moved(rk4, space, there, -speed, steps=256)
    torch.testing.assert_close(home, x, rtol=0, atol=1e-7)


# ---- the stack


def stack_of(**options):
    keys = {"width": 16, "length": 48, "stack": {"name": "geodesic", "options": options}}
    return shaken(build(checked(ModelConfig, Layers(keys)), 61).to_empty(device="cpu"))


def test_each_token_begins_at_its_vector_with_the_velocity_of_the_one_before():
    stack, x, layout = stack_of(unit_speed=False).blocks, noise(3, 8, 16, seed=2) / 4, packed(length=8)
    out, v, space = stack(x, layout).x_BTD, stack.first, stack.flow.space(torch.float64)
    for t in range(8):
        v = torch.where(layout.pos_BT[:, t, None] == 0, stack.first, v)
        end, v = moved(rk4, space, x[:, t], v, steps=3)
        torch.testing.assert_close(out[:, t], end, rtol=1e-12, atol=1e-12)


def test_at_unit_speed_each_token_goes_as_far_whatever_the_velocity_before_it():
    flow, x, v = stack_of().blocks.flow, noise(3, 16) / 4, noise(3, 16, seed=9)
    for slow, fast in zip(flow(x, v), flow(x, 1000 * v)):
        torch.testing.assert_close(slow, fast)
    end, speed = flow(x, v)
    torch.testing.assert_close(flow.space(torch.float64).energy(end, speed), torch.ones(3).double(), rtol=0.05, atol=0)


def test_a_cut_velocity_changes_no_output_and_ends_gradients():
    whole, cut = stack_of(), stack_of(truncate=8)
    layout = Layout.single(3, 48)
    x = whole.embed(tokens()).detach().requires_grad_()
    ends = [model.blocks(x, layout).x_BTD for model in (whole, cut)]
    assert torch.equal(*ends)
    far, near = (torch.autograd.grad(end[:, 12].sum(), x)[0].abs().sum((0, 2)) for end in ends)
    assert (far[:13] > 0).all()
    assert (near[8:13] > 0).all()
    assert (near[:8] == 0).all()


def test_the_metric_runs_under_vmap_over_its_matrices():
    sets = [matrices(0.3), tuple(-m for m in matrices(0.2))]
    x, v = noise(2, 3, WIDTH), noise(2, 3, WIDTH, seed=9)
    together = torch.vmap(lambda x, v, *w: Space(*w).acceleration(x, v))(x, v, *map(torch.stack, zip(*sets)))
    for one, weights, at, by in zip(together, sets, x, v):
        torch.testing.assert_close(one, Space(*weights).acceleration(at, by))
