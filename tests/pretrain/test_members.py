"""Members run as one against the same modules run in turn: outputs, gradients, names."""

from __future__ import annotations

import pytest
import torch

from pretrain.block import make_block
from pretrain.config import ModelConfig, PartConfig
from pretrain.init import initialise
from pretrain.member_names import pieces
from pretrain.members import Members, MemberTables
from tests.contract.cases import noise, packed, shaken

NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "layernorm_plain"])
@pytest.mark.parametrize("mixer", ["correlation", "attention"])
def test_outputs_and_gradients_are_those_of_the_modules_in_turn(norm, mixer):
    config = ModelConfig(width=16, depth=2, length=48, norm=norm, bias=True, mixers=(PartConfig(name=mixer),))
    members, layout = shaken(Members(lambda: make_block(config, 0), NAMES)), packed()
    x = noise(3, 3, 48, 16).requires_grad_()
    y, state, aux = members(x, layout, None)
    assert state is None
    assert aux is None
    (y * noise(*y.shape, seed=5)).sum().backward()
    for k in range(3):
        block, own = make_block(config, 0).double(), x.detach()[k].requires_grad_()
        block.load_state_dict({name: p[k] for name, p in members.stacked().items()})
        alone, _, _ = block(own, layout)
        torch.testing.assert_close(y[k], alone, rtol=0, atol=1e-12)
        (alone * noise(*y.shape, seed=5)[k]).sum().backward()
        torch.testing.assert_close(x.grad[k], own.grad, rtol=1e-9, atol=1e-11)
        for name, p in block.named_parameters():
            torch.testing.assert_close(members.stacked()[name].grad[k], p.grad, rtol=1e-9, atol=1e-11)


def test_each_table_is_read_by_its_member():
    tables, ids = shaken(MemberTables(lambda: _table(), NAMES)), torch.tensor([[0, 6], [3, 3]])
    for k in range(3):
        assert torch.equal(tables(ids)[k], tables.weight[k][ids])


def _table():
    from pretrain.init import embedding

    return embedding(7, 4)


def test_a_members_first_values_depend_on_its_own_name_alone():
    config = ModelConfig(width=16, depth=2, length=48)
    many, one = (Members(lambda: make_block(config, 0), names) for names in (NAMES, ["b"]))
    for members in (many, one):
        initialise(members, 3)
    for name, p in one.stacked().items():
        assert torch.equal(p[0], many.stacked()[name][1]), name
    qkv = many.stacked()["mixer.qkv.weight"]
    assert not torch.equal(qkv[0], qkv[1])


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 9, 10, 14, 15])
def test_a_piece_of_a_stacked_parameter_is_told_by_its_members_names(cut):
    whole = list(range(15))
    for start, stop in ((0, cut), (cut, 15)):
        told = []
        for name, first, last, at in pieces(NAMES, 5, start, stop - start):
            told += [whole[5 * NAMES.index(name) + i] for i in range(first, last)]
            assert whole[start + at] == 5 * NAMES.index(name) + first
        assert told == whole[start:stop]
