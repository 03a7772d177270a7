"""Modules of different shapes in one ensemble: groups of one shape each, which only the layout of a run knows of."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.activations import Saved, activation_bytes
from pretrain.config import OptimConfig
from pretrain.ensemble import fusion as of_fusion
from pretrain.ensemble import shapes
from pretrain.ensemble.alone import module_model
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models import ensemble as of_models
from pretrain.models.build import build
from pretrain.optim import param_groups
from tests.contract.cases import packed, piece, shaken, tokens
from tests.pretrain.ensembles import (
    FUSIONS,
    LENGTH,
    MODULES,
    ROWS,
    SHAPES,
    VOCAB,
    assert_documents_stand_alone,
    batch_of,
    config_of,
    make,
    own_values,
)

over_fusions = pytest.mark.parametrize("fusion", FUSIONS)


def alone_of(model, config, module):
    """A module alone, with the values that it has in an ensemble."""
    alone, values = build(module_model(config, module), VOCAB).to_empty(device="cpu").double(), own_values(model)
    with torch.no_grad():
        for name, p in own_values(alone).items():
            p.copy_(values[name])
    return alone


def apart(config):
    """Every module in a group by itself, whatever its shape."""
    ensemble = config.ensemble
    return [
        config.model_copy(update={"ensemble": ensemble.model_copy(update={"modules": (name,), "shapes": {}})})
        for name in reversed(ensemble.modules)
    ]


@pytest.fixture
def made_apart(monkeypatch):
    """Makes an ensemble of modules of one shape that run each by itself."""

    def make_apart(**keys):
        with monkeypatch.context() as patch:
            for place in (shapes, of_fusion, of_models):
                patch.setattr(place, "groups_of", apart)
            model = shaken(build(config_of(**keys), VOCAB).to_empty(device="cpu"))
        model.know_sources(MODULES)
        return model

    return make_apart


@pytest.mark.parametrize("wrap", [{}, {"passes": 2, "loss": "mean_all"}], ids=["once", "wrapped"])
@over_fusions
def test_how_modules_are_grouped_changes_neither_loss_nor_gradients_nor_what_is_told(made_apart, fusion, wrap):
    keys = {"fusion": fusion, "channel": {"name": "moe", "options": {"experts": 4}}, "wrap": wrap}
    model, split, batch = make(**keys).train(), made_apart(**keys).train(), batch_of(packed())
    assert [len(pairs.embed.weight) for pairs in split.models] == [2, 2, 2, 2]
    values = own_values(model)
    assert own_values(split).keys() == values.keys()
    with torch.no_grad():
        for name, p in own_values(split).items():
            p.copy_(values[name])
    told, split_told = model(batch), split(batch)
    for parts in (told, split_told):
        parts.total.backward()
    torch.testing.assert_close(split_told._asdict(), told._asdict(), rtol=1e-12, atol=1e-12)
    for one in (model, split):
        one.without(["three"])
    mixed = [one.logits(batch.tokens_BT, packed()) for one in (model, split)]
    torch.testing.assert_close(*mixed, rtol=0, atol=1e-12)
    for one in (model, split):
        for p in one.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
    grads = own_values(model)
    for name, grad in own_values(split).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fusion", ["uniform", "mhc"])
def test_each_module_gives_to_the_bit_what_it_gives_alone(fusion):
    keys = {"fusion": fusion, "shapes": SHAPES, "tie": False, "bias": True}
    model, ids, layout = make(**keys), tokens(rows=ROWS, length=LENGTH), packed()
    assert [pairs.width for pairs in model.models] == [24, 16, 8]
    if model.fusion is not None:
        with torch.no_grad():
            model.fusion.out.weight.zero_()
    for module in MODULES:
        model.without([name for name in MODULES if name != module])
        alone = alone_of(model, config_of(**keys), module)
        assert torch.equal(model.logits(ids, layout), alone.logits(ids, layout)), module


def test_first_values_and_names_are_those_of_each_module_alone():
    config = config_of(fusion="mhc", shapes=SHAPES)
    model = build(config, VOCAB).to_empty(device="cpu")
    initialise(model, 7)
    values, of_modules = own_values(model), set()
    for module in MODULES:
        alone = build(module_model(config, module), VOCAB).to_empty(device="cpu")
        initialise(alone, 7)
        for name, p in own_values(alone).items():
            assert torch.equal(p, values[name]), name
            of_modules.add(name)
    assert all("fusion." in name for name in set(values) - of_modules)


def test_shapes_that_say_nothing_new_leave_one_group_and_its_names():
    equal = build(config_of(fusion="mhc", shapes={"two": {"width": 16}, "four": {"depth": 2}}), VOCAB)
    assert list(equal.state_dict()) == list(build(config_of(fusion="mhc"), VOCAB).state_dict())


@over_fusions
def test_a_packed_document_is_read_as_if_it_stood_alone_and_decoding_equals_training(fusion):
    model, ids, layout = make(fusion=fusion, shapes=SHAPES), tokens(rows=ROWS, length=LENGTH), packed()
    together = model.logits(ids, layout)
    assert_documents_stand_alone(model, ids, layout, together)
    state, parts = model.initial_state(ROWS), []
    for start, stop in ((0, 1), (1, 23), (23, LENGTH)):
        logits, state = model.decode(ids[:, start:stop], state, piece(layout, start, stop))
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), together, rtol=0, atol=1e-10)


def test_gradients_reach_everything_that_is_not_frozen_and_run_again_they_are_the_same():
    found, batch = [], batch_of(packed())
    for again in (False, True):
        wrap = {"passes": 2, "loss": "mean_all", "checkpoint": again}
        model = make(fusion="mhc", top=4, shapes=SHAPES, freeze="embeddings", wrap=wrap).train()
        if again:
            model.recompute()
        total = model(batch).total
        total.backward()
        for name, p in model.named_parameters():
            frozen = ".embed." in name
            assert p.requires_grad != frozen
            assert frozen or (p.grad.flatten(1 if name.startswith("models.") else 0) != 0).any(-1).all(), name
        found.append([total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *found))


def test_what_is_trained_how_does_not_depend_on_groups():
    def told(model):
        rates = {n: g["weight_decay"] for g in param_groups(model, OptimConfig()) for n in g["names"]}
        ends = {name.rsplit(".", 1)[-1]: rate for name, rate in rates.items()}
        return ends, len(set(rates.values()))

    assert told(make(fusion="mhc", shapes=SHAPES)) == told(make(fusion="mhc"))


@over_fusions
def test_operations_and_state_are_those_of_the_tensors(fusion):
    model, ids, single = make(fusion=fusion, shapes=SHAPES), tokens(rows=2, length=LENGTH), Layout.single(2, LENGTH)
    stream = Layout(single.doc_BT, single.pos_BT, False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.logits(ids, stream)
    of_blocks = 2 * (2 * 24 * 2 + 16 * 2 + 8 * 3)  # widths of all models' layers
    halved = of_blocks * (3 + 3) * LENGTH + (4 * 3 * LENGTH * 16 if fusion == "mhc" else 0)
    assert counter.get_total_flops() / (2 * LENGTH) == pytest.approx(model.flops_per_token() + halved, rel=0.02)
    _, state = model.decode(ids[:1, :40], model.initial_state(1))
    held = sum(t.numel() for t in tree_leaves(state) if torch.is_tensor(t) and t.is_floating_point())
    assert 2 * held == pytest.approx(model.state_bytes(40), rel=0.02)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_activations_are_counted_as_a_real_pass_keeps_them(checkpoint):
    """Of passes that are run again all but the one that is kept while it is: the largest of any group."""
    config = config_of(fusion="mhc", shapes=SHAPES, wrap={"passes": 3, "checkpoint": checkpoint})
    model = build(config, VOCAB)
    initialise(model.to_empty(device="cpu").train(), 0)
    saved = Saved(model.parameters())
    with saved.counting():
        model(batch_of(packed()))
    one_pass = 0
    if checkpoint:
        group = config_of(["one", "three"], fusion="mhc", width=24)
        once, twice = (
            activation_bytes(
                group.model_copy(update={"wrap": config.wrap.model_copy(update={"passes": n, "checkpoint": False})}),
                VOCAB, ROWS, bf16=False, recompute=False,
            )
            for n in (2, 3)
        )  # fmt: skip
        one_pass = twice - once
    counted = activation_bytes(config, VOCAB, ROWS, bf16=False, recompute=False)
    assert saved.bytes[-1] == pytest.approx(counted - one_pass, rel=0.06)
