"""What an ensemble is trained by: its joint losses, dropout, what is frozen, and in which precision."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.batch import IGNORE
from pretrain.activations import Saved, activation_bytes
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from tests.contract.cases import packed, tokens
from tests.pretrain.ensembles import FUSIONS, LENGTH, MODULES, ROWS, VOCAB, batch_of, config_of, make

over_fusions = pytest.mark.parametrize("fusion", FUSIONS)


def test_the_joint_loss_knows_the_domain_of_a_source_and_forgets_it_over_the_steps():
    batch = batch_of(packed(), source=(0, 1, 3))
    plain = make(fusion="mhc", own_loss=0.0, domain_loss=0.0, balance_loss=0.0, top=4).train()
    mixture = plain(batch).total
    told = make(fusion="mhc", own_loss=0.0, domain_loss=0.5, domain_steps=10, balance_loss=0.0, top=4).train()
    log_pi = plain._relevance(plain.models(batch.tokens_BT, packed()).h_KBTD, packed(), None)[0].log_pi_MBT
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


def cut_after(whole, passes: int, **keys):
    """The same ensemble, whose stacks are run fewer times."""
    part = make(wrap={"passes": passes}, **keys).train()
    own = dict(whole.named_parameters())
    with torch.no_grad():
        for name, p in part.named_parameters():
            p.copy_(own[name])
    return part


@pytest.mark.parametrize("modules", [["one"], MODULES], ids=["a module alone", "all"])
@over_fusions
def test_the_loss_of_all_passes_is_the_mean_of_ensembles_that_end_at_each_in_gradients_too(fusion, modules):
    keys = {"modules": modules, "fusion": fusion, "channel": {"name": "moe", "options": {"experts": 4}}}
    every, batch = make(wrap={"passes": 3, "loss": "mean_all"}, **keys).train(), batch_of(packed())
    with torch.no_grad():
        every.models.shifts[0].beta.zero_()  # one pass has none
    parts = every(batch)
    parts.total.backward()
    cuts = [cut_after(every, passes, **keys) for passes in (1, 2, 3)]
    told = [cut(batch) for cut in cuts]
    # what channel mixers tell is of all passes: here it is only a part of the last one's
    own = [sum(aux.loss for aux in cut.models(batch.tokens_BT, layout_of(batch)).auxes) * batch.count for cut in cuts]
    expected = sum(each.total - of_channel for each, of_channel in zip(told, own)) / 3 + own[-1]
    torch.testing.assert_close(parts.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.loss_BT, told[-1].loss_BT, rtol=1e-12, atol=0)
    expected.backward()
    for name, p in every.named_parameters():
        grads = [q.grad for cut in cuts for n, q in cut.named_parameters() if n == name and q.grad is not None]
        if p.requires_grad and name != "models.shifts.0.beta":
            torch.testing.assert_close(p.grad, sum(grads), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(every(batch).total, told[-1].total)


def layout_of(batch) -> Layout:
    return Layout(batch.doc_BT, batch.pos_BT, not batch.packed)


@pytest.mark.parametrize("again", ["passes", "blocks", "both"])
def test_what_is_run_again_changes_no_bit_of_loss_and_gradients(again):
    keys, batch, found = {"fusion": "mhc", "top": 4, "dropout": 0.1}, batch_of(packed()), []
    for wanted in (False, True):
        checkpoint = wanted and again != "blocks"
        model = make(wrap={"passes": 3, "loss": "mean_all", "checkpoint": checkpoint}, **keys).train()
        if wanted and again != "passes":
            model.recompute()
        torch.manual_seed(0)
        total = model(batch).total
        total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))


def kept(recompute=False, **wrap):
    shape = config_of(fusion="mhc", width=32, wrap=wrap)
    return activation_bytes(shape, VOCAB, ROWS, bf16=False, recompute=recompute)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_real_pass_of_a_wrapped_ensemble_keeps_what_is_counted(checkpoint):
    model = build(config_of(fusion="mhc", width=32, wrap={"passes": 3, "checkpoint": checkpoint}), VOCAB)
    initialise(model.to_empty(device="cpu").train(), 0)
    saved = Saved(model.parameters())
    with saved.counting():
        model(batch_of(packed()))
    one_pass = kept(passes=3) - kept(passes=2)
    counted = kept(passes=3, checkpoint=checkpoint) - (one_pass if checkpoint else 0)
    assert saved.bytes[-1] == pytest.approx(counted, rel=0.06)
    assert kept(True, passes=3, checkpoint=True) < kept(True, passes=3) < kept(passes=3, checkpoint=True)


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
    # clusters ask the most of single modules, of which alone it is 0.036 to 0.055
    assert (a - b).norm() / a.norm() < (6e-2 if fusion == "clusters" else 5e-2)


@over_fusions
def test_in_bf16_the_mixtures_probabilities_add_up_to_one(fusion):
    model, ids = make(fusion=fusion).bfloat16(), tokens(rows=ROWS, length=LENGTH)
    log_p = model.logits(ids, packed())
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(ROWS, LENGTH), rtol=0, atol=2e-6)
