"""The recurrent wrap beside its equation: a deeper model whose layers share weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from configs.load import Layers, find, load
from configs.load import build as checked
from data_pipeline.batch import Batch
from pretrain.activations import Saved, activation_bytes
from pretrain.channel import Aux, ChannelMixer
from pretrain.config import ModelConfig, OptimConfig, RunConfig, WrapConfig
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.optim import param_groups
from pretrain.stack import REGISTRY
from pretrain.wrap import Wrap
from tests.contract.cases import VOCAB, noise, packed, shaken, tokens
from tests.contract.test_stacks import batch_of

HYBRID = [{"name": "correlation"}, {"name": "attention"}]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def model_of(**keys):
    """Two layers in float64 with random parameters."""
    own = {"width": 16, "depth": 2, "length": 48, "mixers": HYBRID}
    return shaken(build(checked(ModelConfig, Layers(own | keys)), VOCAB).to_empty(device="cpu"))


def wrapped(**wrap):
    """The same, run three times."""
    return model_of(wrap={"passes": 3} | wrap)


def gradients(model, batch):
    """Of the loss, by parameter, for those that have one."""
    model.zero_grad()
    model(batch).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_pass_without_a_shift_is_the_stack_itself():
    plain, x = model_of().blocks, noise(3, 48, 16)
    wrap = Wrap(plain, 16, WrapConfig(passes=1)).double()
    nn.init.zeros_(wrap.shifts[0].beta)
    assert torch.equal(wrap(x, packed()).x_BTD, plain(x, packed()).x_BTD)
    assert model_of(wrap={"passes": 1}).blocks.__class__ is plain.__class__


def unrolled(stacks, shifts, x: Tensor) -> list[Tensor]:
    """What each of some stacks gives, one after the other, each behind its shift."""
    outputs = []
    for stack, shift in zip(stacks, shifts):
        x = stack(x + shift, packed()).x_BTD
        outputs.append(x)
    return outputs


def test_three_passes_equal_a_model_of_three_times_the_layers_with_equal_weights():
    """In outputs, and in gradients: that of a shared weight is the sum over its copies."""
    wrap, x, y = wrapped().blocks, noise(3, 48, 16), noise(3, 48, 16, seed=5)
    stacks = [model_of().blocks for _ in range(3)]
    for stack in stacks:
        stack.load_state_dict(wrap.inner.state_dict())
    shifts = [s.beta.detach().clone().requires_grad_() for s in wrap.shifts]
    ends = [wrap(x, packed()).x_BTD, unrolled(stacks, shifts, x)[-1]]
    torch.testing.assert_close(*ends, **CLOSE)
    for end in ends:
        (end * y).sum().backward()
    for shift, expected in zip(wrap.shifts, shifts):
        torch.testing.assert_close(shift.beta.grad, expected.grad, **CLOSE)
    for name, p in wrap.inner.named_parameters():
        torch.testing.assert_close(p.grad, sum(stack.get_parameter(name).grad for stack in stacks), **CLOSE)


def test_an_unrolled_model_is_one_stack_of_three_times_the_layers():
    wrap, x = wrapped().blocks, noise(3, 48, 16)
    deep = model_of(depth=6).blocks
    for layer, block in enumerate(deep):
        block.load_state_dict(wrap.inner[layer % 2].state_dict())
    for shift in wrap.shifts:
        nn.init.zeros_(shift.beta)
    torch.testing.assert_close(wrap(x, packed()).x_BTD, deep(x, packed()).x_BTD, **CLOSE)


def test_shifts_begin_at_zero_and_do_not_decay():
    model = build(checked(ModelConfig, Layers({"width": 16, "wrap": {"passes": 3}})), VOCAB).to_empty(device="cpu")
    initialise(model, 0)
    assert all(torch.equal(shift.beta, torch.zeros(16)) for shift in model.blocks.shifts)
    decay = {name: g["weight_decay"] for g in param_groups(model, OptimConfig()) for name in g["names"]}
    assert [decay[f"blocks.shifts.{r}.beta"] for r in range(3)] == [0.0, 0.0, 0.0]


# ---- the loss of all passes


def test_the_loss_of_all_passes_is_the_mean_of_theirs_in_gradients_too():
    last, every, batch = wrapped(), wrapped(loss="mean_all"), batch_of(packed())
    wrap, x = last.blocks, last.embed(batch.tokens_BT)
    layout = Layout(batch.doc_BT, batch.pos_BT, False)
    losses = []
    for shift in wrap.shifts:
        x = wrap.inner(shift(x), layout).x_BTD
        losses.append(last.head(last.norm(x).flatten(0, 1), last.embed.weight, batch.targets_BT.flatten())[0])
    parts = every(batch)
    torch.testing.assert_close(parts.total, torch.stack(losses).mean())
    (sum(losses) / 3).backward()
    expected = {name: p.grad for name, p in last.named_parameters()}
    for name, grad in gradients(every, batch).items():
        torch.testing.assert_close(grad, expected[name], **CLOSE)


def test_what_is_told_of_each_token_and_in_evaluation_is_the_last_pass():
    last, every, batch = wrapped(), wrapped(loss="mean_all"), batch_of(packed())
    torch.testing.assert_close(every(batch).loss_BT, last(batch).loss_BT)
    assert abs(every(batch).total - last(batch).total) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(every(batch).total, last(batch).total)


# ---- memory


def test_recomputing_passes_blocks_or_both_changes_no_gradient():
    batch = batch_of(packed())
    expected = gradients(wrapped(), batch)
    for checkpoint, recompute in ((True, False), (False, True), (True, True)):
        model = wrapped(checkpoint=checkpoint).train()
        if recompute:
            model.recompute()
        assert (model.blocks.recompute, model.blocks.inner.recompute) == (checkpoint, recompute)
        for name, grad in gradients(model, batch).items():
            torch.testing.assert_close(grad, expected[name], **CLOSE)


def shape_of(**wrap):
    return checked(ModelConfig, Layers({"width": 32, "depth": 4, "length": 64, "wrap": wrap}))


def kept(recompute, **wrap):
    return activation_bytes(shape_of(**wrap), 97, 4, bf16=False, recompute=recompute)


def test_three_passes_keep_three_times_the_activations_unless_they_are_run_again():
    plain, three, again = kept(False), kept(False, passes=3), kept(False, passes=3, checkpoint=True)
    assert 2.8 * plain < three < 3 * plain
    assert again == pytest.approx(plain + 3 * 4 * 64 * 32 * 4, rel=0.01), "that of one pass, and the input of each"
    assert kept(True) < kept(True, passes=3, checkpoint=True) < kept(True, passes=3) < again


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_real_forward_pass_keeps_what_is_counted(checkpoint):
    """With passes that are run again: all but the one that is kept while it is; the first also kept the angles."""
    model = build(shape_of(passes=3, checkpoint=checkpoint), 97).to_empty(device="cpu").train()
    initialise(model, 0)
    ids, saved = torch.zeros(4, 64, dtype=torch.long), Saved(model.parameters())
    with saved.counting():
        model(Batch(ids, ids, ids, ids, torch.zeros(4, dtype=torch.long), 256, True))
    one_pass = kept(False, passes=3) - kept(False, passes=2)
    counted = kept(False, passes=3, checkpoint=checkpoint) - (one_pass if checkpoint else 0)
    assert saved.bytes[-1] == pytest.approx(counted, rel=0.06)


# ---- what channel mixers tell


class Teller(ChannelMixer):
    """Tells the size of what it is given, and how many tokens."""

    def __init__(self):
        super().__init__()
        self.settled = None

    def forward(self, x_BTD, layout):
        size = x_BTD.abs().sum()
        return x_BTD, Aux(size / x_BTD.shape[0], torch.stack((size.detach(), torch.tensor(float(x_BTD.shape[1])))))

    def flops_per_token(self):
        return 0

    def measure_names(self):
        return ("size", "tokens")

    def settle(self, measures):
        self.settled = list(measures)


def test_channel_mixers_tell_once_for_all_passes_losses_averaged_and_measures_summed():
    model, batch = wrapped(), batch_of(packed())
    tellers = [Teller(), Teller()]
    for block, teller in zip(model.blocks.inner, tellers):
        block.channel = teller
    assert model.measure_names() == [f"blocks.inner.{n}.channel/{what}" for n in (0, 1) for what in ("size", "tokens")]
    given = [[], []]
    for teller, sizes in zip(tellers, given):
        teller.register_forward_hook(lambda _, inputs, __, sizes=sizes: sizes.append(inputs[0].detach().abs().sum()))
    parts = model(batch)
    expected = [value for sizes in given for value in (sum(sizes), 3 * 48)]
    torch.testing.assert_close(parts.measures, torch.tensor(expected, dtype=torch.float64))
    extra = batch.count * sum(sum(sizes) for sizes in given) / 3 / 3
    torch.testing.assert_close(parts.total, parts.loss_BT.sum() + extra)
    model.settle(parts.measures.tolist())
    assert [teller.settled for teller in tellers] == [parts.measures.tolist()[:2], parts.measures.tolist()[2:]]


# ---- other stacks


@pytest.mark.parametrize("stack", REGISTRY.names())
def test_every_stack_can_be_wrapped(stack):
    """Decoded step by step it gives what it gives at once, and every shift is trained."""
    model = model_of(stack={"name": stack}, wrap={"passes": 2, "loss": "mean_all"})
    ids, state, steps = tokens(length=12), model.initial_state(3), []
    for t in range(12):
        logits, state = model.decode(ids[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model.logits(ids, Layout.single(3, 12)), rtol=0, atol=1e-10)
    model(batch_of(packed())).total.backward()
    assert all(torch.count_nonzero(shift.beta.grad) for shift in model.blocks.shifts)


@pytest.mark.parametrize(("name", "plain"), [("leviathan-wrap3", "leviathan-50k"), ("elita-wrap3", "elita")])
def test_a_wrapped_preset_is_its_plain_one_and_three_shifts(name, plain):
    wrapped, once = (load(RunConfig, [find(f"models/{which}")]).model for which in (name, plain))
    assert wrapped.model_copy(update={"wrap": WrapConfig()}) == once
    counts = [sum(p.numel() for p in build(config, 257).parameters()) for config in (wrapped, once)]
    assert counts[0] - counts[1] == 3 * once.width
    costs = [build(config, 257).blocks.flops_per_token(256) for config in (wrapped, once)]
    assert costs[0] == 3 * costs[1]
