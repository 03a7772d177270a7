"""What an ensemble is trained by: its joint losses, dropout, what is frozen, and in which precision."""

from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from data_pipeline.batch import IGNORE
from pretrain.models.build import build
from tests.contract.cases import packed, tokens
from tests.pretrain.ensembles import FUSIONS, LENGTH, ROWS, VOCAB, batch_of, config_of, make

over_fusions = pytest.mark.parametrize("fusion", FUSIONS)


def test_the_joint_loss_knows_the_domain_of_a_source_and_forgets_it_over_the_steps():
    batch = batch_of(packed(), source=(0, 1, 3))
    plain = make(fusion="mhc", own_loss=0.0, domain_loss=0.0, balance_loss=0.0, top=4).train()
    mixture = plain(batch).total
    told = make(fusion="mhc", own_loss=0.0, domain_loss=0.5, domain_steps=10, balance_loss=0.0, top=4).train()
    log_pi = plain._relevance(plain.models(batch.tokens_BT, packed())[0], packed(), None)[0].log_pi_MBT
    counted = (batch.targets_BT != IGNORE) & (batch.pos_BT >= 16)
    extra = -sum((log_pi[m, row] * counted[row]).sum() for row, m in enumerate((0, 1, 3)))
    torch.testing.assert_close(told(batch).total - mixture, 0.5 * extra)
    told.begin_step(5)
    torch.testing.assert_close(told(batch).total - mixture, 0.25 * extra)
    told.begin_step(10)
    torch.testing.assert_close(told(batch).total, mixture)


def test_the_right_module_is_heard_of_where_it_was_left_out():
    batch = batch_of(packed(), source=(0, 1, 3))
    extra, grads = [], []
    for top in (1, 2, 4):
        told, plain = (
            make(fusion="mhc", own_loss=0.0, domain_loss=weight, domain_steps=10, balance_loss=0.0, top=top).train()
            for weight in (0.5, 0.0)
        )
        difference = told(batch).total - plain(batch).total
        extra.append(difference.item())
        difference.backward()
        grads.append(told.fusion.query.weight.grad + plain.fusion.query.weight.grad)
    assert extra == pytest.approx([extra[0]] * 3)
    assert grads[0].norm() > 0
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_of_a_long_document_no_more_is_asked_of_the_right_module_than_of_one_token_in_a_million():
    batch = batch_of(packed(), source=(0, 1, 3))
    words = {"fusion": "posterior", "own_loss": 0.0, "domain_steps": 10, "domain_from": 0, "balance_loss": 0.0}
    told, plain = (make(domain_loss=weight, **words).train() for weight in (1.0, 0.0))
    with torch.no_grad():
        for model in (told, plain):
            for p in model.models.parameters():
                p.mul_(20)  # modules that are sure of themselves, and wrong
    counted = int((batch.targets_BT != IGNORE).sum())
    assert told(batch).total - plain(batch).total <= 13.8 * counted


def test_frozen_modules_keep_their_values_and_the_fusion_learns():
    for freeze, moved in (("modules", "fusion."), ("embeddings", "")):
        model = make(fusion="mhc", freeze=freeze, top=4).train()
        model(batch_of(packed())).total.backward()
        for name, p in model.named_parameters():
            frozen = name.startswith("models.") if freeze == "modules" else name.startswith("models.embed")
            assert (p.grad is None) == frozen, name
            assert frozen or name.startswith(moved)


def test_dropout_is_of_the_embedding_the_branches_and_what_models_take_from_each_other():
    model, batch = make(fusion="uniform", dropout=0.5).train(), batch_of(packed())
    entered, taken = [], []
    model.models.layers[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    coupling = model.models.layers[0].couplings
    coupling.register_forward_hook(lambda _, given, found: taken.append(found[0] - given[0]))
    model(batch)
    for part in (entered[0], taken[0]):
        assert 0.4 < (part == 0).double().mean() < 0.6
        assert not torch.equal(part[0] == 0, part[1] == 0), "each model has a mask of its own"
    model.eval()
    plain = make(fusion="uniform").eval()
    torch.testing.assert_close(model(batch).total, plain(batch).total)


def test_a_wrap_that_an_ensemble_would_not_heed_is_refused():
    for wrap in ({"passes": 2, "loss": "mean_all"}, {"passes": 2, "checkpoint": True}):
        with pytest.raises(ConfigError, match="trains the last pass of its models' wrap"):
            build(config_of(fusion="uniform", wrap=wrap), VOCAB)


@over_fusions
def test_bf16_stays_near_float64(fusion):
    exact, low, batch = make(fusion=fusion, top=4), make(fusion=fusion, top=4).bfloat16(), batch_of(packed())
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters()):
            p.copy_(q)
    totals = [model(batch).total for model in (exact, low)]
    for total in totals:
        total.backward()
    whole, near = (total.item() for total in totals)
    assert near == pytest.approx(whole, rel=2e-2)
    a, b = (
        torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad]) for model in (exact, low)
    )
    # of single modules it is 0.036 to 0.055
    assert (a - b).norm() / a.norm() < 6e-2


@over_fusions
def test_in_bf16_the_mixtures_probabilities_add_up_to_one(fusion):
    model, ids = make(fusion=fusion).bfloat16(), tokens(rows=ROWS, length=LENGTH)
    log_p = model.logits(ids, packed())
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(ROWS, LENGTH), rtol=0, atol=2e-6)
