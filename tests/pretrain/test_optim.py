"""Learning rates of all steps, groups of parameters, and what an update does, beside torch and by hand."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from pretrain.config import ModelConfig, OptimConfig, PartConfig
from pretrain.init import initialise
from pretrain.mixer import ParamGroup
from pretrain.models.build import build
from pretrain.optim import STATE_KEYS, lr_scale, make_optimizer, param_groups, prime, set_lr, set_updates

SCHEDULES = ("cosine", "wsd", "constant", "inverse_sqrt")
BETA1, BETA2, EPS, LR, DECAY = 0.8, 0.9, 1e-6, 0.01, 0.3
OPTIM = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY, "muon_lr": 0.05}


def shares(steps, **keys):
    """The learning rate of every step, as a share of the highest."""
    return list(map(lr_scale(OptimConfig(**keys), steps), range(steps)))


def small(**keys):
    """A model with a parameter of every sort."""
    mixers = tuple(PartConfig(name=name, options={"heads": 2}) for name in ("correlation", "attention"))
    config = ModelConfig(**{"width": 8, "depth": 2, "length": 6, "mixers": mixers, **keys})
    model = build(config, 11).to_empty(device="cpu")
    initialise(model, 0)
    return model


EVERY_SORT = {"bias": True, "norm": "layernorm", "positions": "learned", "tie": False}
MATRICES = {
    f"blocks.{n}.{path}.weight" for n in (0, 1) for path in ("mixer.qkv", "mixer.out", "channel.up", "channel.down")
}


# ---- the learning rate

plans = st.fixed_dictionaries({
    "schedule": st.sampled_from(SCHEDULES), "warmup_steps": st.integers(0, 150), "decay_steps": st.integers(0, 150),
    "final_lr": st.floats(0.001, 1),
})  # fmt: skip


@given(plan=plans, steps=st.integers(1, 150))
def test_every_step_has_a_rate_which_rises_in_warm_up_and_never_after_it(plan, steps):
    at, warmup = shares(steps, **plan), plan["warmup_steps"]
    assert all(0 < share <= 1 for share in at)
    assert at[:warmup] == [(step + 1) / warmup for step in range(min(warmup, steps))]
    assert all(later <= now + 1e-15 for now, later in zip(at[max(0, warmup - 1) :], at[warmup:]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_longer_than_the_run_is_a_line_that_ends_below_the_top(schedule):
    assert shares(5, schedule=schedule, warmup_steps=10) == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_highest_rate(schedule):
    assert shares(50, schedule=schedule, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.1), (10, 0.0), (10, 0.25), (10, 1.0)])
def test_cosine_begins_at_the_top_is_half_way_in_the_middle_and_lands_on_the_final_rate(warmup, final):
    scale = lr_scale(OptimConfig(schedule="cosine", warmup_steps=warmup, final_lr=final), 110)
    assert scale(warmup) == 1.0
    assert scale((warmup + 110) // 2) == pytest.approx((1 + final) / 2, abs=1e-12)
    assert scale(110) == scale(5000) == pytest.approx(final, abs=1e-15)
    assert scale(109) == pytest.approx(final, abs=1e-3)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_wsd_is_flat_then_a_line_whose_last_step_has_the_final_rate(final):
    at = shares(100, schedule="wsd", warmup_steps=5, decay_steps=20, final_lr=final)
    assert set(at[5:80]) == {1.0}
    assert at[80:] == pytest.approx([1 - (1 - final) * (n + 1) / 20 for n in range(20)], abs=1e-15)
    assert at[-1] == pytest.approx(final, abs=1e-15)


@pytest.mark.parametrize(("steps", "falls"), [(200, 20), (19, 1), (5, 1), (1, 1)])
def test_wsd_falls_over_a_tenth_of_the_run_unless_told_otherwise(steps, falls):
    at = shares(steps, schedule="wsd", warmup_steps=0)
    assert at == shares(steps, schedule="wsd", warmup_steps=0, decay_steps=falls)
    assert sum(share < 1 for share in at) == falls


def test_constant_stays_and_inverse_sqrt_falls_with_the_root_from_the_end_of_warm_up():
    assert shares(90, schedule="constant", warmup_steps=10)[9:] == [1.0] * 81
    root = shares(90, schedule="inverse_sqrt", warmup_steps=10)
    assert root[9:] == [sqrt(10 / (step + 1)) for step in range(9, 90)]
    assert root[39] == 0.5


# ---- which parameter is treated how


def facts_by_name(model, **keys):
    groups = param_groups(model, OptimConfig(**{**OPTIM, **keys}))
    return {name: group for group in groups for name in group["names"]}


def test_matrices_decay_and_norms_embeddings_biases_and_lag_weights_do_not():
    model = small(**EVERY_SORT)
    groups = facts_by_name(model)
    names = set(dict(model.named_parameters()))
    assert {"embed.weight", "places.weight", "blocks.0.mixer.form.weights", "head.bias", "norm.weight"} < names
    assert {name for name, group in groups.items() if group["weight_decay"] == DECAY} == MATRICES | {"head.weight"}
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == names - MATRICES - {"head.weight"}
    assert {(group["lr"], group["highest_lr"], group["kind"]) for group in groups.values()} == {(LR, LR, "adamw")}


def test_a_tied_head_is_the_embedding_and_does_not_decay():
    groups = facts_by_name(small(tie=True))
    assert {name for name, group in groups.items() if group["weight_decay"]} == MATRICES


@pytest.mark.parametrize("channel", ["mlp", "swiglu"])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else(channel):
    model = small(**EVERY_SORT, channel=PartConfig(name=channel))
    groups = facts_by_name(model, name="muon")
    muon = {name for name, group in groups.items() if group["kind"] == "muon"}
    assert muon == {
        n for n, p in model.named_parameters() if n.startswith("blocks.") and n.endswith("weight") and p.ndim == 2
    }
    assert {groups[name]["lr"] for name in muon} == {0.05}
    assert {groups[name]["lr"] for name in groups.keys() - muon} == {LR}
    assert groups["head.weight"]["weight_decay"] == DECAY


@pytest.mark.parametrize("name", ["adamw", "muon"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_every_trainable_parameter_is_in_one_group_and_a_frozen_one_in_none(name, data):
    keys = {"tie": st.booleans(), "bias": st.booleans(), "norm": st.sampled_from(["rmsnorm", "layernorm"])}
    model = small(**data.draw(st.fixed_dictionaries(keys)))
    frozen = data.draw(st.sets(st.sampled_from([n for n, _ in model.named_parameters()])))
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path not in frozen)
    groups = param_groups(model, OptimConfig(name=name))
    assert sorted(n for group in groups for n in group["names"]) == sorted(
        n for n, _ in model.named_parameters() if n not in frozen
    )
    by_name = dict(model.named_parameters())
    for group in groups:
        assert group["names"]
        assert all(by_name[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_what_a_mixer_asks_for_itself_goes_before_the_general_rule():
    model = small(bias=True)
    asks = [ParamGroup(("qkv.bias",), lr=0.5), ParamGroup(("qkv.weight",), lr=3.0, decay=False)]
    model.blocks[0].mixer.param_groups = lambda: asks
    groups = facts_by_name(model, name="muon")
    bias, own = groups["blocks.0.mixer.qkv.bias"], groups["blocks.0.mixer.qkv.weight"]
    other = groups["blocks.1.mixer.qkv.weight"]
    assert (bias["lr"], bias["weight_decay"]) == (0.5 * LR, DECAY)
    assert (own["kind"], own["lr"], own["weight_decay"]) == ("adamw", 3.0 * LR, 0.0)
    assert (other["kind"], other["lr"], other["weight_decay"]) == ("muon", 0.05, DECAY)


def test_a_group_over_a_parameter_that_is_not_there_is_told():
    model = small()
    model.blocks[1].channel.param_groups = lambda: [ParamGroup(("up.weigth",), lr=0.1)]
    with pytest.raises(
        ConfigError, match=r"blocks\.1\.channel \(Mlp\) names .*'up\.weigth'.*; it has up\.weight, down"
    ):
        param_groups(model, OptimConfig())


# ---- what an update does


def give_grads(parameters, step):
    """Gradients that are a function of the step and the place of a parameter."""
    for number, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(1000 * step + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def fresh(name):
    """A model's parameters under an optimizer whose state exists, as the engines have it."""
    model = small(**EVERY_SORT)
    config = OptimConfig(**OPTIM, name=name)
    optimizer = make_optimizer(param_groups(model, config), config)
    for group in optimizer.param_groups:
        prime(optimizer, group["params"], group["kind"])
    return list(model.parameters()), optimizer


def run(parameters, optimizer, steps):
    for step in steps:
        give_grads(parameters, step)
        set_lr(optimizer, 1 / (step + 1))
        optimizer.step()


def test_muon_and_adamw_behind_one_face_do_what_torchs_own_do():
    parameters, both = fresh("muon")
    plain = small(**EVERY_SORT)
    parts = []
    for group in param_groups(plain, OptimConfig(**OPTIM, name="muon")):
        shared = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if group["kind"] == "muon":
            parts.append(torch.optim.Muon(group["params"], **shared, momentum=0.95, nesterov=True))
        else:
            parts.append(torch.optim.AdamW(group["params"], **shared, betas=(BETA1, BETA2), eps=EPS, fused=True))
    highest = [part.param_groups[0]["lr"] for part in parts]
    for step in range(4):
        run(parameters, both, [step])
        give_grads(list(plain.parameters()), step)
        for part, lr in zip(parts, highest):
            part.param_groups[0]["lr"] = lr / (step + 1)
            part.step()
    first = dict(small(**EVERY_SORT).named_parameters())
    for ours, (name, theirs) in zip(parameters, plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours, first[name]), name


def test_adamw_is_the_published_formula_in_float64():
    parameters, optimizer = fresh("adamw")
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    exact = [p.detach().double() for p in parameters]
    m, v = [torch.zeros_like(p) for p in exact], [torch.zeros_like(p) for p in exact]
    for step in range(6):
        run(parameters, optimizer, [step])
        lr, t = LR / (step + 1), step + 1
        for n, parameter in enumerate(parameters):
            grad = parameter.grad.double()
            m[n] = BETA1 * m[n] + (1 - BETA1) * grad
            v[n] = BETA2 * v[n] + (1 - BETA2) * grad**2
            corrected = (m[n] / (1 - BETA1**t)) / ((v[n] / (1 - BETA2**t)).sqrt() + EPS)
            exact[n] = exact[n] - lr * decays[id(parameter)] * exact[n] - lr * corrected
    for parameter, expected in zip(parameters, exact):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_primed_and_loaded_goes_on_to_the_bit(name):
    parameters, optimizer = fresh(name)
    run(parameters, optimizer, range(3))
    others, loaded = fresh(name)
    with torch.no_grad():
        for group, new in zip(optimizer.param_groups, loaded.param_groups):
            for old_p, new_p in zip(group["params"], new["params"]):
                new_p.copy_(old_p)
                assert {*optimizer.state[old_p]} - {"step"} == {*STATE_KEYS[group["kind"]]}
                for key in STATE_KEYS[group["kind"]]:
                    loaded.state[new_p][key].copy_(optimizer.state[old_p][key])
    set_updates(loaded, 3)
    run(parameters, optimizer, range(3, 6))
    run(others, loaded, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    forgot, unset = fresh(name)
    run(forgot, unset, range(3, 6))
    assert not any(torch.equal(a, b) for a, b in zip(parameters, forgot))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_priming_alone_changes_no_update_and_nothing_that_is_already_there(name):
    parameters, primed = fresh(name)
    model, config = small(**EVERY_SORT), OptimConfig(**OPTIM, name=name)
    unprimed = make_optimizer(param_groups(model, config), config)
    run(parameters, primed, range(2))
    for group in primed.param_groups:
        prime(primed, group["params"], group["kind"])
    run(parameters, primed, [2])
    run(list(model.parameters()), unprimed, range(3))
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
