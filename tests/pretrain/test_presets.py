"""The presets have the shapes and counts that were published, and those derived from them (docs/CORRELATION.md)."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from configs.load import find, load
from launcher.prepare import resolve
from pretrain.config import PartConfig, RunConfig
from pretrain.ensemble.alone import seed_model
from pretrain.models.build import build

SHAPES = {
    # width, heads, blocks, width of the channel mixer as a multiple
    "leviathan-5k": (4, 2, 2, 4),
    "leviathan-50k": (32, 2, 2, 4),
    "leviathan-77m": (800, 20, 20, 1),
    "leviathan-154m": (800, 20, 20, 4),
    "leviathan-relu3": (32, 2, 2, 3),
    "leviathan-leaky6": (32, 2, 2, 6),
}
over_presets = pytest.mark.parametrize("name", SHAPES)


def config(name, **changes):
    return load(RunConfig, [find(f"models/{name}")]).model.model_copy(update=changes)


def dot_product(name, **changes):
    """A Leviathan preset with one lag, which is the dot product and has no weight of a lag."""
    heads = SHAPES[name][1]
    return config(name, mixers=(PartConfig(name="correlation", options={"heads": heads, "lags": 1}),), **changes)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def in_block(width, mult):
    """Projections with biases, the channel mixer with biases, two LayerNorms."""
    return 4 * (width**2 + width) + 2 * mult * width**2 + (mult + 1) * width + 4 * width


def around_blocks(width, vocab, length):
    """Embedding, positions, the last norm, a head of its own with a bias."""
    return vocab * width + length * width + 2 * width + vocab * width + vocab


@over_presets
@pytest.mark.parametrize("vocab", [65, 257])
def test_every_count_follows_from_the_shape_vocabulary_length_and_mixer(name, vocab):
    width, heads, blocks, mult = SHAPES[name]
    dot = blocks * in_block(width, mult) + around_blocks(width, vocab, 512)
    assert parameters(build(dot_product(name), vocab)) == dot
    assert parameters(build(config(name), vocab)) == dot + blocks * heads * 4  # a weight for each of 4 lags


@pytest.mark.parametrize("vocab", [65, 257])
def test_the_mixture_adds_routers_and_experts_to_the_dense_preset(vocab):
    expert = 2 * 32 * 64 + 64 + 32  # two layers and their biases, half as wide as the dense network
    dense = 2 * 32 * 128 + 128 + 32
    more = 2 * (8 * expert + 8 * 32 - dense)
    assert parameters(build(config("leviathan-moe"), vocab)) == parameters(build(config("leviathan-50k"), vocab)) + more


def test_the_published_count_of_5315_parameters_is_that_of_the_dot_product():
    """91 symbols, a table of 1,000 positions; the published correlation has no parameters of its own."""
    assert parameters(build(dot_product("leviathan-5k", length=1000), 91)) == 5315
    assert parameters(build(config("attention-5k", length=1000), 91)) == 5315
    assert parameters(build(config("leviathan-5k", length=1000), 91)) == 5315 + 2 * 2 * 4


@pytest.mark.parametrize(("name", "count"), [("leviathan-77m", 76_960_000), ("leviathan-154m", 153_808_000)])
def test_the_blocks_of_the_published_sizes_have_the_published_counts(name, count):
    for chosen in (dot_product(name), config(name.replace("leviathan", "attention"))):
        assert sum(parameters(block) for block in build(chosen, 65).blocks) == count
    assert sum(parameters(block) for block in build(config(name), 65).blocks) == count + 20 * 20 * 4


@pytest.mark.parametrize(
    ("name", "vocab", "length", "count"),
    [
        ("leviathan-50k", 65, 512, 46_081),
        ("leviathan-77m", 65, 512, 77_475_265),
        ("leviathan-154m", 65, 512, 154_323_265),
        ("leviathan-154m", 10_000, 512, 170_229_200),
        ("leviathan-154m", 50_257, 1024, 235_090_257),
    ],
)
def test_the_counts_with_embeddings_are_those_derived(name, vocab, length, count):
    assert parameters(build(dot_product(name, length=length), vocab)) == count


def test_77_million_is_also_half_the_published_blocks():
    assert 10 * in_block(800, 4) == 76_904_000


@over_presets
def test_a_preset_has_its_published_shape_in_layernorm_learned_positions_biases_and_a_head_of_its_own(name):
    width, heads, blocks, mult = SHAPES[name]
    chosen = config(name)
    model = build(chosen, 65)
    assert (chosen.norm, chosen.positions, chosen.bias, chosen.tie) == ("layernorm", "learned", True, False)
    assert (model.width, len(model.blocks), model.length) == (width, blocks, 512)
    assert all(block.mixer.heads == heads for block in model.blocks)
    assert all(block.channel.up.out_features == mult * width for block in model.blocks)


@pytest.mark.parametrize("vocab", [65, 257])
def test_the_ensemble_is_the_demos_eight_models_their_couplings_and_a_fusion(vocab):
    model = config("ensemble")
    assert model == resolve(["demo"], [])[0].model
    single = parameters(build(seed_model(model), vocab))
    coupling = 2 * 32 + 4 * 32**2 + 2 * 2 + 1  # two norms, four projections, weights of two heads' two lags, a gate
    fusion = 4 * 3 * 32 * 32 + 32 + 32**2 + 2 * 2 + 32 * vocab  # W_u, W_k, W_v of each module, norm, W_q, lags, W_o
    assert parameters(build(model, vocab)) == 8 * (single + 2 * coupling) + fusion


def test_the_published_variants_of_the_block_have_their_activations():
    for name, activation in (("leviathan-relu3", F.relu), ("leviathan-leaky6", F.leaky_relu)):
        assert all(block.channel.activation is activation for block in build(config(name), 65).blocks)
