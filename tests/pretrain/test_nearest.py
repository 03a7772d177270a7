"""Relevance by clusters: against its equation written out, and what of it is kept where the file is gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError, DataError, UsageError
from data_pipeline.clusters import Clusters, buckets_of, load, save, unit
from pretrain.ensemble.alone import module_model
from pretrain.init import initialise, materialise
from pretrain.layout import Layout
from pretrain.models.build import build
from tests.contract.cases import packed, piece, tokens
from tests.pretrain.ensembles import (
    EMBEDDED,
    LENGTH,
    ROWS,
    VOCAB,
    batch_of,
    clusters_file,
    config_of,
    make,
    of_clusters,
)


def begun(**ensemble):
    """An ensemble in float64 with the file's clusters as they are."""
    model = materialise(build(config_of(fusion="clusters", **ensemble), VOCAB), "cpu")
    initialise(model, 3)
    return model.double()


def naive(ids: list[int], found: Clusters, temperature: float) -> np.ndarray:
    """(T, M): pi after each id of one document, every prefix embedded anew."""
    rows = []
    for end in range(1, len(ids) + 1):
        table = found.table_HE.astype(np.float64)
        e = unit(table[buckets_of(np.array(ids[:end]), found.facts)].sum(0))
        weight = np.exp(-np.square(e - found.centres_KE.astype(np.float64)).sum(1) / temperature)
        rows.append(weight / weight.sum())
    return np.stack(rows)


def relevance(model, ids, layout):
    h = model.models(ids, layout)[0]
    return model._weighed(ids, h, layout, None)[0].log_pi_MBT.exp()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_relevance_is_the_equation_computed_document_by_document(temperature):
    model = begun(clusters=of_clusters(temperature=temperature))
    ids, layout, found = tokens(rows=ROWS, length=LENGTH), packed(), load(Path(clusters_file()))
    pi_MBT = relevance(model, ids, layout)
    for row in range(ROWS):
        for number in layout.doc_BT[row].unique():
            place = torch.nonzero(layout.doc_BT[row] == number).flatten()
            expected = naive(ids[row, place].tolist(), found, temperature)
            got = pi_MBT[:, row, place].T.detach().numpy()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 31])
def test_a_stream_in_pieces_of_any_size_has_the_relevance_of_the_whole(size):
    model, ids, layout = begun(), tokens(rows=ROWS, length=LENGTH), packed()
    whole, _ = model.nearest(ids, layout)
    state, parts = None, []
    for start in range(0, LENGTH, size):
        stop = min(start + size, LENGTH)
        part, state = model.nearest(ids[:, start:stop], piece(layout, start, stop), state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    assert state.sum_BE.shape == (ROWS, EMBEDDED)
    assert torch.equal(state.ids_BG, ids[:, -2:])


def test_a_document_after_a_long_other_one_is_read_as_alone_in_single_precision():
    model = begun().float()
    ids = tokens(rows=1, length=4096)
    pos = torch.cat((torch.arange(4000), torch.arange(96)))[None]
    doc = (torch.arange(4096) >= 4000).long()[None]
    together, _ = model.nearest(ids, Layout(doc, pos, False))
    alone, _ = model.nearest(ids[:, 4000:], Layout.single(1, 96))
    torch.testing.assert_close(together[:, :, 4000:], alone, rtol=0, atol=1e-5)
    assert together.dtype == torch.float32


def test_left_out_modules_are_renormalised_and_what_is_kept_keeps_its_proportions():
    model, ids, layout = begun(), tokens(rows=ROWS, length=LENGTH), packed()
    whole = relevance(model, ids, layout)
    model.without(["two"])
    rest = relevance(model, ids, layout)
    assert torch.count_nonzero(rest[1]) == 0
    kept = [0, 2, 3]
    torch.testing.assert_close(rest[kept], whole[kept] / whole[kept].sum(0), rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="no module 'five'"):
        model.without(["five"])


def test_an_ensemble_of_some_of_the_clusters_has_their_centres_by_name():
    four, found = begun(), load(Path(clusters_file()))
    some = materialise(build(config_of(["four", "two"], fusion="clusters"), VOCAB), "cpu")
    initialise(some, 3)
    assert torch.equal(some.nearest.centres, torch.from_numpy(found.centres_KE[[3, 1]]))
    assert torch.equal(some.nearest.table, four.nearest.table.float())


def test_clusters_are_frozen_saved_with_the_model_and_in_no_module_alone():
    model = begun().train()
    before = {name: p.clone() for name, p in model.nearest.named_parameters()}
    model(batch_of(packed())).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.nearest.parameters())
    assert {"nearest.table", "nearest.centres"} <= model.state_dict().keys()
    assert all(torch.equal(p, before[name]) for name, p in model.nearest.named_parameters())
    alone = build(module_model(config_of(fusion="clusters"), "one"), VOCAB)
    assert alone.nearest is None
    assert not [name for name in alone.state_dict() if "nearest" in name]
    assert module_model(config_of(fusion="clusters"), "one") == module_model(config_of(fusion="uniform"), "one")


def test_without_its_file_a_model_takes_its_values_from_a_checkpoint_and_begins_no_run(tmp_path):
    path = tmp_path / "clusters.safetensors"
    path.write_bytes(Path(clusters_file()).read_bytes())
    saved = begun(clusters=of_clusters(str(path)))
    path.unlink()
    model = begun(clusters=of_clusters(str(path)))
    assert model.nearest.table.isnan().all(), "no value that could be taken for one"
    with pytest.raises(ConfigError, match="there is no file of clusters"):
        model.check_first_values("a" * 64)
    model.load_state_dict(saved.state_dict())
    ids, layout = tokens(rows=ROWS, length=LENGTH), packed()
    assert torch.equal(model.logits(ids, layout), saved.logits(ids, layout))


def test_files_that_do_not_suit_the_model_are_refused_in_a_sentence(tmp_path):
    found = load(Path(clusters_file()))
    path = tmp_path / "clusters.safetensors"

    def told(kind, tokenizer="a" * 64, **facts):
        save(path, Clusters(replace(found.facts, **facts), found.table_HE, found.centres_KE))
        with pytest.raises(kind) as error:
            begun(clusters=of_clusters(str(path))).check_first_values(tokenizer)
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is None
        return str(error.value)

    assert "the module 'four' is none of them" in told(ConfigError, names=("one", "two", "three", "web"))
    assert f"vocabulary 99, and here it is {VOCAB}" in told(ConfigError, vocab=99)
    assert "ids 2, and here it is 3" in told(ConfigError, ids=2)
    assert "another tokenizer (aaaaaaaaaaaa…, the shards have bbbbbbbbbbbb…)" in told(DataError, tokenizer="b" * 64)
    begun().check_first_values("a" * 64)
    make(fusion="uniform").check_first_values("whatever")


def test_clusters_are_asked_for_by_their_file():
    with pytest.raises(ConfigError, match=r"no clusters\.file"):
        config_of(fusion="clusters", clusters={})
    with pytest.raises(ConfigError, match="nothing to train"):
        config_of(fusion="clusters", freeze="modules")
    assert config_of(fusion="clusters", clusters=of_clusters()).ensemble.clusters.temperature == 0.1
