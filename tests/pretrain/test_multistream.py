"""Multistream against its equation, one head of one stream after the other, and what it tells of its attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap

from configs.load import Layers
from configs.load import build as checked
from data_pipeline.batch import Batch
from pretrain import stack
from pretrain.config import ModelConfig
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from tests.contract.cases import noise, packed, shaken

B, T, D, HEADS, VOCAB = 2, 9, 16, 2, 11
WIDTH = D // HEADS
over_cuts = pytest.mark.parametrize("cuts", [(), (1, 5)])


def config_of(name="multistream", depth=2, **options):
    part, mixer = {"name": name, "options": options}, {"name": "attention", "options": {"heads": HEADS}}
    return checked(ModelConfig, Layers({"width": D, "depth": depth, "length": T, "stack": part, "mixers": [mixer]}))


def multistream(seed=0, depth=2, **options):
    """The stack in float64 with random parameters, none of them zero."""
    return shaken(stack.make(config_of(depth=depth, heads=HEADS, **options)), seed)


def layout_of(cuts=(1, 5)):
    return packed(rows=B, length=T, cuts=cuts)


@over_cuts
def test_one_stream_whose_heads_do_not_talk_is_blocks_of_attention(cuts):
    model, blocks = multistream(streams=1, talking="none"), shaken(stack.make(config_of("blocks")))
    torch.nn.init.ones_(model.gain.weight)
    torch.nn.init.zeros_(model.shift.weight)
    for layer, block in zip(model.layers, blocks):
        layer.load_state_dict({k.replace("mixer.", "attention."): v for k, v in block.state_dict().items()})
    x, layout = noise(B, T, D), layout_of(cuts)
    torch.testing.assert_close(model(x, layout).x_BTD, blocks(x, layout).x_BTD, rtol=0, atol=1e-12)


def heads_in_turn(layer, x_s, layout, streams, before):
    """The layer's equation. x_s: the streams. before: what mixes a list of scores over all heads."""
    attention, count = layer.attention, streams * HEADS
    q, k, v = [], [], []
    for x in x_s:
        projected = attention.qkv(layer.norm1(x)).unflatten(-1, (3, HEADS, WIDTH))
        rotary = layout.rotary(WIDTH, 10000.0, x.dtype)
        for h in range(HEADS):
            q.append(rotary.rotate(projected[:, :, 0, h][:, None])[:, 0])
            k.append(rotary.rotate(projected[:, :, 1, h][:, None])[:, 0])
            v.append(projected[:, :, 2, h])
    talked = before([q[m] @ k[m].transpose(1, 2) / WIDTH**0.5 for m in range(count)])
    weights = [s.masked_fill(~layout.mask()[:, 0], -torch.inf).softmax(-1) for s in talked]
    after = torch.eye(count) + attention.talk_after.weight
    y = [sum(after[m, n] * weights[n] for n in range(count)) @ v[m] for m in range(count)]
    out = []
    for s, x in enumerate(x_s):
        x = x + attention.out(torch.cat(y[s * HEADS : (s + 1) * HEADS], dim=-1))
        out.append(x + layer.channel(layer.norm2(x), layout)[0])
    return out


@over_cuts
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("talking", ["linear", "nonlinear"])
def test_heads_of_all_streams_talk_before_the_mask_and_after_softmax(cuts, streams, talking):
    model, layout, x = multistream(streams=streams, talking=talking), layout_of(cuts), noise(B, T, D)

    def linear(layer, scores):
        mixing = torch.eye(len(scores)) + layer.attention.talk.weight
        return [sum(mixing[m, n] * scores[n] for n in range(len(scores))) for m in range(len(scores))]

    def nonlinear(layer, scores):
        talk, s = layer.attention.talk, torch.stack(scores, dim=-1)
        unit = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6) * talk.gain
        return list((s + F.gelu(unit @ talk.up.T) @ talk.down.T).unbind(-1))

    x_s = [x * model.gain.weight[s] + model.shift.weight[s] for s in range(streams)]
    for layer in model.layers:
        kind = linear if talking == "linear" else nonlinear
        x_s = heads_in_turn(layer, x_s, layout, streams, lambda scores, kind=kind, layer=layer: kind(layer, scores))
    torch.testing.assert_close(model(x, layout).x_BTD, sum(x_s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("talking", ["linear", "nonlinear"])
def test_heads_begin_without_a_word(talking):
    talks, silent = (stack.make(config_of(heads=HEADS, talking=kind)).double() for kind in (talking, "none"))
    initialise(talks, 0)
    silent.load_state_dict({k: v for k, v in talks.state_dict().items() if "talk" not in k})
    x, layout = noise(B, T, D), layout_of()
    torch.testing.assert_close(talks(x, layout).x_BTD, silent(x, layout).x_BTD, rtol=0, atol=1e-14)


def test_streams_begin_with_different_tokens():
    model = stack.make(config_of(streams=3))
    initialise(model, 0)
    assert model.shift.weight.std(0).min() > 0.01


def test_a_later_token_is_not_talked_about():
    """Scores of later keys are mixed before the mask, and none of them is left after it."""
    model, layout, x = multistream(streams=2, talking="nonlinear", diversity=0.5), Layout.single(B, T), noise(B, T, D)
    before = model(x, layout)
    x[0, 5:] *= 100
    after = model(x, layout)
    assert torch.equal(after.x_BTD[0, :5], before.x_BTD[0, :5])
    assert torch.equal(after.x_BTD[1], before.x_BTD[1])


def test_the_auxiliary_loss_is_minus_the_entropy_of_attention_averaged_over_streams():
    model, layout, x = multistream(depth=1, streams=3, talking="none", diversity=0.5), layout_of(), noise(B, T, D)
    (attention,) = (layer.attention for layer in model.layers)
    x_s = [model.layers[0].norm1(x * model.gain.weight[s] + model.shift.weight[s]) for s in range(3)]
    rotary, entropies = layout.rotary(WIDTH, 10000.0, x.dtype), torch.zeros(B, T).double()
    for h in range(HEADS):
        mean = torch.zeros(B, T, T).double()
        for u in x_s:
            q, k, _ = attention.qkv(u).unflatten(-1, (3, HEADS, WIDTH))[:, :, :, h].unbind(2)
            scores = rotary.rotate(q[:, None])[:, 0] @ rotary.rotate(k[:, None])[:, 0].transpose(1, 2) / WIDTH**0.5
            mean += scores.masked_fill(~layout.mask()[:, 0], -torch.inf).softmax(-1) / 3
        entropies += torch.special.entr(mean).sum(-1) / HEADS
    (told,) = model(x, layout).aux
    torch.testing.assert_close(told.loss, -0.5 * entropies.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(told.measures, torch.stack((entropies.sum(), torch.tensor(B * T).double())))
    (figures,) = [m.figures(told.measures.tolist()) for m in model.modules() if hasattr(m, "talk_after")]
    assert figures == {"entropy": pytest.approx(entropies.mean().item())}, "nats a token, whatever the batch"
    told.loss.backward()
    assert torch.isfinite(attention.qkv.weight.grad).all()


def test_the_model_adds_the_auxiliary_loss_and_names_what_it_measures():
    losses, layout, ids = [], layout_of(), torch.arange(B * T).view(B, T) % VOCAB
    batch = Batch(ids, ids, layout.doc_BT, layout.pos_BT, torch.zeros(B, dtype=torch.long), B * T, True)
    for diversity in (0.0, 0.5):
        model = shaken(build(config_of(heads=HEADS, diversity=diversity), VOCAB).to_empty(device="cpu"))
        losses.append(model(batch))
    names = [f"blocks.layers.{n}.attention/{what}" for n in range(2) for what in ("entropy", "tokens")]
    assert model.measure_names() == names
    assert losses[0].measures is None
    torch.testing.assert_close(losses[1].total, losses[0].total - 0.5 * losses[1].measures[::2].sum())
    assert torch.equal(losses[0].loss_BT, losses[1].loss_BT)


def test_members_of_an_ensemble_may_be_multistream():
    """Under torch.func.vmap over parameters and inputs it computes what a loop over them does."""
    members = [multistream(seed, talking="nonlinear") for seed in (0, 5)]
    x, layout = noise(2, B, T, D), layout_of()
    together = vmap(lambda p, b, x_BTD: functional_call(members[0], (p, b), (x_BTD, layout)).x_BTD)(
        *stack_module_state(members), x
    )
    for member, value, got in zip(members, x, together):
        torch.testing.assert_close(got, member(value, layout).x_BTD, rtol=0, atol=1e-12)
