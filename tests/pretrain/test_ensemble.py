"""The ensemble against its equations, its modules alone, and the guarantees it gives."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import ConfigError, UsageError
from data_pipeline.batch import IGNORE
from pretrain.ensemble.coupling import Coupling
from pretrain.layout import Layout
from pretrain.members import members_of
from pretrain.models.build import build
from pretrain.models.language_model import LanguageModel
from tests.contract.cases import noise, packed, piece, tokens
from tests.pretrain.ensembles import (
    FUSIONS,
    LENGTH,
    MODULES,
    ROWS,
    SHAPES,
    VOCAB,
    WIDTH,
    assert_documents_stand_alone,
    batch_of,
    config_of,
    make,
)

over_fusions = pytest.mark.parametrize("fusion", FUSIONS)


@over_fusions
@pytest.mark.parametrize("kind", ["one document a row", "packed documents"])
def test_decoding_step_by_step_and_in_pieces_equals_the_training_form(fusion, kind):
    model, ids = make(fusion=fusion), tokens(rows=ROWS, length=LENGTH)
    layout = packed() if kind == "packed documents" else Layout.single(ROWS, LENGTH)
    whole = model.logits(ids, layout)
    for cuts in (range(1, LENGTH), (5, 23)):
        state, parts = model.initial_state(ROWS), []
        for start, stop in zip((0, *cuts), (*cuts, LENGTH)):
            logits, state = model.decode(ids[:, start:stop], state, piece(layout, start, stop))
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


@over_fusions
def test_a_later_token_and_another_row_change_nothing(fusion):
    model, ids, layout = make(fusion=fusion), tokens(rows=ROWS, length=LENGTH), Layout.single(ROWS, LENGTH)
    before = model.logits(ids, layout)
    for t in (1, 20, LENGTH - 1):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 1) % VOCAB
        changed[1] = (changed[1] + 1) % VOCAB
        after = model.logits(changed, layout)
        assert torch.equal(after[0, :t], before[0, :t])
        assert torch.equal(after[2], before[2])
        assert (after[0, t:] - before[0, t:]).abs().amax(-1).min() > 0


@over_fusions
def test_a_packed_document_is_read_as_if_it_stood_alone_and_a_prefix_as_the_whole(fusion):
    model, ids, layout = make(fusion=fusion), tokens(rows=ROWS, length=LENGTH), packed()
    together = model.logits(ids, layout)
    assert_documents_stand_alone(model, ids, layout, together)
    whole = model.logits(ids, Layout.single(ROWS, LENGTH))
    part = model.logits(ids[:1, :7], Layout.single(1, 7))
    torch.testing.assert_close(part, whole[:1, :7], rtol=0, atol=1e-12)


@over_fusions
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_gets_a_gradient(fusion, recompute):
    model = make(fusion=fusion, top=4 if fusion == "mhc" else 2).train()
    if recompute:
        model.recompute()
    model(batch_of(packed())).total.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    dead = [n for n, p in trained if p.grad is None or torch.count_nonzero(p.grad) == 0]
    assert dead == []
    stacked = [p.grad for n, p in model.named_parameters() if n.startswith("models.")]
    assert all((grad.flatten(1) != 0).any(1).all() for grad in stacked), "every member's part has a gradient"


@over_fusions
def test_the_loss_of_a_batch_is_that_of_the_mixtures_probabilities(fusion):
    model, layout = make(fusion=fusion).eval(), packed()
    batch = batch_of(layout)
    log_p = model.logits(batch.tokens_BT, layout)
    expected = F.nll_loss(log_p.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(model(batch).loss_BT.flatten(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(ROWS, LENGTH).double(), rtol=0, atol=1e-12)


def test_members_run_as_one_are_the_members_run_in_turn():
    config = config_of(fusion="uniform")
    model = make(fusion="uniform")
    ids, layout = tokens(rows=ROWS, length=LENGTH), packed()
    h_KBTD = model.models(ids, layout).h_KBTD[-1]
    places = dict(members_of(model))
    one = [LanguageModel(config, VOCAB).double() for _ in range(8)]
    x = []
    for k, single in enumerate(one):
        values = {
            "embed.weight": model.models.embed.weight[k],
            "norm.weight": places["models.norm"].stacked()["weight"][k],
        }
        for layer in range(2):
            own = places[f"models.layers.{layer}.blocks"].stacked()
            values |= {f"blocks.{layer}.{name}": p[k] for name, p in own.items()}
        single.load_state_dict(values)
        x.append(single.embed(ids))
    for layer in range(2):
        x = [single.blocks[layer](value, layout, None)[0] for single, value in zip(one, x)]
        own, coupled = places[f"models.layers.{layer}.couplings"].stacked(), []
        for k, value in enumerate(x):
            coupling: Coupling = model.models.layers[layer].couplings.template
            parameters = {name: p[k] for name, p in own.items()}
            other = x[k ^ 1]
            coupled.append(torch.func.functional_call(coupling, parameters, (value, other, None, layout))[0])
        x = coupled
    expected = torch.stack([single.norm(value) for single, value in zip(one, x)])
    torch.testing.assert_close(h_KBTD, expected, rtol=0, atol=1e-12)


def test_with_gates_of_zero_a_pair_is_the_mean_of_two_independent_models():
    model, ids, layout = make(["one"]), tokens(rows=ROWS, length=LENGTH), packed()
    with torch.no_grad():
        for layer in model.models.layers:
            layer.couplings.gate.zero_()
    config = config_of(["one"])
    values = dict(model.models.named_parameters())
    logits = []
    for k in range(2):
        single = LanguageModel(config, VOCAB).double()
        own = {n.replace("layers.", "blocks.").replace(".blocks.", ".", 1).replace("/", "."): p[k]
               for n, p in values.items() if "couplings" not in n}  # fmt: skip
        single.load_state_dict(own)
        logits.append(single.logits(ids, layout))
    mean = torch.stack(logits).mean(0).log_softmax(-1)
    torch.testing.assert_close(model.logits(ids, layout), mean, rtol=0, atol=1e-12)


PRIOR = {"one": 0.002, "two": 5.0, "three": 1.0, "four": 0.4}


@pytest.mark.parametrize("without", [[], ["two"]], ids=["all", "without the likeliest"])
@pytest.mark.parametrize("prior", [{}, PRIOR], ids=["all alike", "a prior"])
def test_the_posterior_is_never_worse_than_any_module_by_more_than_its_prior_says(prior, without):
    """Per sequence: NLL of the mixture <= NLL of m - ln prior_m, for every m. (DEMix; here to rounding.)"""
    there = [name for name in MODULES if name not in without]
    shares = [prior.get(name, 1.0) for name in there]
    for seed in range(3):
        model = make(fusion="posterior", prior=prior)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + seed)
        layout = packed()
        batch = batch_of(layout)
        model.without(without)
        mixture = model(batch).loss_BT
        alone = []
        for name in there:
            model.without([other for other in MODULES if other != name])
            alone.append(model(batch).loss_BT)
        for row in range(ROWS):
            for number in layout.doc_BT[row].unique():
                place = layout.doc_BT[row] == number
                for loss, share in zip(alone, shares):
                    most = float(loss[row, place].sum()) - log(share / sum(shares))
                    assert float(mixture[row, place].sum()) <= most + 1e-9


def test_before_anything_is_read_modules_are_worth_their_prior_and_equal_shares_change_no_bit():
    batch, layout = batch_of(packed()), packed()
    plain = make(fusion="posterior").train()
    equal = make(fusion="posterior", prior=dict.fromkeys(MODULES, 0.3)).train()
    assert torch.equal(equal(batch).total, plain(batch).total)
    assert torch.equal(equal.logits(batch.tokens_BT, layout), plain.logits(batch.tokens_BT, layout))
    shares = torch.tensor(list(PRIOR.values()), dtype=torch.float64)
    first = Layout.single(ROWS, 1)
    for memory in (1.0, 0.5):
        told = make(fusion="posterior", prior=PRIOR, memory=memory)
        mixed, alone = told.logits(batch.tokens_BT[:, :1], first), []
        for name in MODULES:
            told.without([other for other in MODULES if other != name])
            alone.append(told.logits(batch.tokens_BT[:, :1], first))
        of_each = (shares / shares.sum()).log().view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, (of_each + torch.stack(alone)).logsumexp(0), rtol=1e-12, atol=0)


@over_fusions
def test_one_module_left_is_that_module_alone_and_relevance_adds_up(fusion):
    model, ids, layout = make(fusion=fusion), tokens(rows=ROWS, length=LENGTH), packed()
    if model.fusion is not None:
        with torch.no_grad():
            model.fusion.out.weight.zero_()
    model.without(MODULES[:3])
    alone = make(["four"])
    own = dict(model.models.named_parameters())
    with torch.no_grad():
        for name, p in alone.models.named_parameters():
            p.copy_(own[name][6:8])
    torch.testing.assert_close(model.logits(ids, layout), alone.logits(ids, layout), rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="no module 'five'"):
        model.without(["five"])
    with pytest.raises(UsageError, match="keep at least one"):
        model.without(MODULES)


def test_relevance_is_the_attention_that_modules_get_and_keeps_the_top():
    """The two-stage softmax is one over all (module, position), written out."""
    model, h, layout = make(fusion="mhc", top=4), noise(4, ROWS, LENGTH, WIDTH), packed()
    fusion = model.fusion
    fused, _ = fusion([h], layout, [True] * 4)
    u = fusion.norm(sum(h[m] @ fusion.mix.weight[m].T for m in range(4)))
    q = fusion.query(u).view(ROWS, LENGTH, 2, 8)
    kv = torch.stack([h[m] @ fusion.key_value.weight[m].T for m in range(4)])
    k, v = kv[..., :16].view(4, ROWS, LENGTH, 2, 8), kv[..., 16:].view(4, ROWS, LENGTH, 2, 8)
    P = torch.einsum("bthe,mbshe->bhmts", q, k) * 8**-0.5
    S = fusion.weights[:, 0, 0].view(1, 2, 1, 1, 1) * P
    shifted = F.pad(P[..., :-1, :-1], (1, 0, 1, 0))
    reach = (layout.pos_BT >= 1)[:, None, None, :, None] & (layout.pos_BT >= 1)[:, None, None, None, :]
    S = S + fusion.weights[:, 1, 0].view(1, 2, 1, 1, 1) * shifted * reach
    S = S.masked_fill(~layout.mask()[:, :, None], -torch.inf)
    A = S.permute(0, 1, 3, 2, 4).flatten(3).softmax(-1).unflatten(3, (4, LENGTH))
    pi = A.sum(-1).mean(1)
    torch.testing.assert_close(fused.log_pi_MBT.exp(), pi.permute(2, 0, 1), rtol=0, atol=1e-12)
    found = torch.einsum("bhtms,mbshe->bthe", A, v).flatten(2)
    torch.testing.assert_close(fused.found_BTF, found, rtol=0, atol=1e-12)
    fusion.top = 2
    kept = fusion([h], layout, [True] * 4)[0].log_pi_MBT.exp()
    assert ((kept > 0).sum(0) == 2).all()
    top = pi.topk(2, dim=-1)
    expected = torch.zeros_like(pi).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    torch.testing.assert_close(kept, expected.permute(2, 0, 1), rtol=0, atol=1e-12)


def test_measures_tell_relevance_and_loss_of_each_module_by_source():
    model, batch = make(fusion="mhc"), batch_of(packed(), source=(0, 2, 2))
    named = dict(zip(model.measure_names(), model(batch).measures.tolist()))
    counted = batch.targets_BT != IGNORE
    assert named["one/tokens"] == counted[0].sum()
    assert named["three/tokens"] == counted[1:].sum()
    assert sum(named[f"three/relevance/{m}"] for m in MODULES) == pytest.approx(named["three/tokens"])
    assert named["two/tokens"] == named["two/loss/one"] == 0


@over_fusions
def test_the_formulas_for_operations_and_state_are_those_of_the_tensors(fusion):
    model, ids, single = make(fusion=fusion), tokens(rows=2, length=LENGTH), Layout.single(2, LENGTH)
    stream = Layout(single.doc_BT, single.pos_BT, False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.logits(ids, stream)
    halved = 8 * 2 * (3 + 3) * LENGTH * WIDTH + (4 * 3 * LENGTH * 16 if fusion == "mhc" else 0)
    assert counter.get_total_flops() / (2 * LENGTH) == pytest.approx(model.flops_per_token() + halved, rel=0.02)
    _, state = model.decode(ids[:1, :40], model.initial_state(1))
    held = sum(t.numel() for t in tree_leaves(state) if torch.is_tensor(t) and t.is_floating_point())
    assert 2 * held == pytest.approx(model.state_bytes(40), rel=0.02)


def test_a_module_begins_the_same_whatever_other_modules_there_are():
    from pretrain.init import initialise

    alone, all_four = (
        build(config_of(["two"]), VOCAB).to_empty(device="cpu"),
        build(config_of(fusion="mhc"), VOCAB).to_empty(device="cpu"),
    )
    for model in (alone, all_four):
        initialise(model, 7)
    own = dict(all_four.named_parameters())
    for name, p in alone.named_parameters():
        assert torch.equal(p, own[name][2:4]), name


def test_mistakes_in_an_ensemble_are_told():
    for wrong, told in (
        ({"fusion": "none"}, "fusion none"),
        ({"fusion": "mhc", "top": 5}, "top 5 of 4"),
        ({"fusion": "btx", "top": 1}, "set top to 2 or more"),
        ({"fusion": "mhc", "domains": {"web": "five"}}, "'five'"),
        ({"fusion": "mhc", "heads": 3}, "multiple"),
        ({"fusion": "posterior", "freeze": "modules"}, "nothing to train"),
        ({"fusion": "mhc", "shapes": {"five": {"width": 8}}}, "gives a shape to 'five', which is no module"),
        ({"fusion": "btx", "shapes": {"two": {"depth": 3}}}, "'two' a shape of its own, but fusion btx makes all"),
        ({"fusion": "posterior", "prior": {"one": 1.0}}, "but none for 'two'; give every module one"),
        ({"fusion": "posterior", "prior": PRIOR | {"five": 1.0}}, "a prior for 'five', which is no module"),
        ({"fusion": "posterior", "prior": PRIOR | {"four": 0.0}}, "a prior of 0 for 'four'; make it more than 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            config_of(**wrong)
    with pytest.raises(ConfigError, match="twice"):
        config_of(["one", "one"], fusion="mhc")
    with pytest.raises(ConfigError, match="plain blocks"):
        build(config_of(fusion="uniform", logits={"hidden": 8}), VOCAB)
    with pytest.raises(ConfigError, match=r"^model.ensemble.shapes.two: model.width 9 is not a multiple of 2 heads"):
        build(config_of(fusion="uniform", shapes={"two": {"width": 9}}), VOCAB)


VARIANTS = [
    {"wrap": {"passes": 2}},
    {"positions": "learned", "tie": False, "bias": True, "norm": "layernorm"},
    {"mixers": [{"name": "elita"}, {"name": "attention", "options": {"heads": 4, "kv_heads": 2}}]},
    {"channel": {"name": "moe", "options": {"experts": 4}}},
    {"couple_every": 2, "norm": "layernorm_plain", "channel": {"name": "feedforward2"}},
    {"couple_every": 0},
    {"fusion": "posterior", "prior": PRIOR, "memory": 0.9},
    {"shapes": SHAPES, "tie": False, "positions": "learned"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda keys: "-".join(keys))
def test_any_blocks_serve_as_models_of_an_ensemble(variant):
    model, layout = make(**{"fusion": "mhc", "top": 4, **variant}).train(), packed()
    batch = batch_of(layout)
    model(batch).total.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0]
    assert dead == []
    model.eval()
    whole, state, parts = model.logits(batch.tokens_BT, layout), model.initial_state(ROWS), []
    for start, stop in ((0, 1), (1, 17), (17, 30), (30, LENGTH)):
        logits, state = model.decode(batch.tokens_BT[:, start:stop], state, piece(layout, start, stop))
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)
    changed = batch.tokens_BT.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % VOCAB
    after = model.logits(changed, layout)
    torch.testing.assert_close(after[0, :20], whole[0, :20], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1:], whole[1:], rtol=0, atol=1e-12)


def test_torch_can_compile_all_models_as_one_graph():
    model, batch = make(fusion="mhc"), batch_of(packed())
    quiet = model(batch)
    quiet.total.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(batch)
    torch.testing.assert_close(compiled.total, quiet.total, rtol=1e-12, atol=0)
    compiled.total.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()
