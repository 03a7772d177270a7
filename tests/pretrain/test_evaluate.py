"""Held-out figures: every token once, the same whatever the batches, and what `leviathan eval` makes of them."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.errors import DataError
from data_pipeline.batch import IGNORE
from data_pipeline.build import build as build_shards
from data_pipeline.config import DataConfig, SourceConfig
from launcher.texts import evaluate_run
from pretrain.evaluate import HeldOut, evaluate
from pretrain.layout import Layout
from pretrain.model import LossParts
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder, read_lines
from pretrain.trained import Trained, evaluate_trained, load_trained
from tests.conftest import leviathan
from tests.small_run import small_config, train_small

ALONE = Ranks(0, 1, 0, "here")


@pytest.fixture(scope="module")
def run(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that evaluated itself at its end."""
    config = small_config(tmp_path_factory.mktemp("evaluate"), shards, corpus)
    return train_small(config, "eval.every=12", "eval.rows=9")


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> Trained:
    return load_trained(run)


def heldout(trained: Trained, most: int | None = None) -> HeldOut:
    dataset = trained.dataset
    return HeldOut(dataset.manifest, dataset.shards, ["letters", "lists"], trained.config.model.length, most)


def documents(trained: Trained, source: str) -> list[np.ndarray]:
    """Every held-out document of a source, by another way than rows."""
    manifest, out = trained.dataset.manifest, []
    for place in manifest.rows_of(source, "heldout"):
        shard = trained.dataset.shards[int(place)]
        ids = np.empty(shard.tokens, dtype=np.int64)
        shard.copy(0, shard.tokens, ids)
        out += np.split(ids, shard.ends()[:-1, 0])
    return out


def test_every_held_out_token_but_the_first_of_a_document_is_a_target_once(trained):
    figures = evaluate_trained(trained, rows=None, batch_rows=5)
    for source in ("letters", "lists"):
        assert figures["sources"][source]["tokens"] == sum(len(ids) - 1 for ids in documents(trained, source))
    assert figures["tokens"] == sum(one["tokens"] for one in figures["sources"].values())
    assert figures["tokens"] == sum(count for _, _, _, count in figures["by_position"])


def test_the_loss_is_that_of_a_plain_pass_over_each_row(trained):
    figures = evaluate_trained(trained, rows=None, batch_rows=7)
    total = count = size = 0.0
    lengths = trained.dataset.tokenizer.byte_lengths
    for batch in heldout(trained).batches(ALONE, 1):
        with torch.no_grad():
            logits = trained.model.logits(batch.tokens_BT, Layout(batch.doc_BT, batch.pos_BT, False))
        targets = batch.targets_BT.flatten()
        total += F.cross_entropy(logits.flatten(0, 1).double(), targets, ignore_index=IGNORE, reduction="sum").item()
        counted = targets[targets != IGNORE]
        count += len(counted)
        size += lengths[counted.numpy()].sum()
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(exp(total / count), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(total / log(2) / size, rel=1e-5)


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_figures_do_not_depend_on_the_batches(trained, batch_rows):
    one, other = (evaluate_trained(trained, rows=11, batch_rows=rows) for rows in (16, batch_rows))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert [entry[3] for entry in one["by_position"]] == [entry[3] for entry in other["by_position"]]


def test_ranks_share_the_rows_and_have_equally_many_batches(trained):
    whole = heldout(trained)
    shares = [list(whole.batches(Ranks(rank, 3, 0, "here"), 4)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    rows = [len(batch.tokens_BT) for share in shares for batch in share]
    # a rank that has nothing left has one row that does not count
    assert sum(rows) == len(whole.rows) + sum(not (b.targets_BT != IGNORE).any() for share in shares for b in share)
    assert max(rows) == 4
    counted = sum(int((batch.targets_BT != IGNORE).sum()) for share in shares for batch in share)
    assert counted == evaluate_trained(trained, rows=None, batch_rows=16)["tokens"]


class Told:
    """A model that tells how many rows it was given."""

    def __call__(self, batch):
        rows = torch.tensor([float(len(batch.tokens_BT))])
        return LossParts(torch.zeros(()), torch.zeros(batch.tokens_BT.shape), rows)


@pytest.mark.parametrize(("rows", "batch_rows"), [(11, 16), (11, 4), (1, 3)])
def test_what_a_model_tells_is_of_real_rows_alone(trained, rows, batch_rows):
    told = []
    evaluate(
        Told(), heldout(trained, rows), trained.dataset.tokenizer.byte_lengths, ALONE, batch_rows=batch_rows,
        told_by=lambda measures: told.append(list(measures)) or {},
    )  # fmt: skip
    assert told == [[2.0 * rows]]


def test_a_rank_without_rows_tells_nothing(trained, monkeypatch):
    told = []
    monkeypatch.setattr("pretrain.evaluate.sum_over_ranks", lambda sums: sums)
    monkeypatch.setattr("pretrain.evaluate._figures", lambda *sums: {})  # there is nothing to divide by
    evaluate(
        Told(), heldout(trained, 1), trained.dataset.tokenizer.byte_lengths, Ranks(2, 3, 0, "here"), batch_rows=1,
        told_by=lambda measures: told.append(list(measures)) or {},
    )  # fmt: skip
    assert told == [[0.0]]


def test_fewer_rows_are_spread_over_all_of_a_source_and_always_the_same(trained):
    all_rows, some = heldout(trained).rows, heldout(trained, 10).rows
    assert [row.source for row in some].count(0) == [row.source for row in some].count(1) == 10
    assert set(some) <= set(all_rows)
    assert some == heldout(trained, 10).rows
    letters = [row for row in all_rows if row.source == 0]
    places = [letters.index(row) for row in some if row.source == 0]
    assert max(places) > len(letters) / 2 > min(places)


def test_positions_are_told_in_buckets_that_double(trained):
    buckets = [
        (first, last) for first, last, _, _ in evaluate_trained(trained, rows=None, batch_rows=16)["by_position"]
    ]
    assert buckets == [(0, 0), (1, 2), (3, 6), (7, 14), (15, 30), (31, 31)]


def test_every_batch_is_told_to_who_watches(trained):
    seen = []
    evaluate(
        trained.model, heldout(trained, 10), trained.dataset.tokenizer.byte_lengths, ALONE, batch_rows=8,
        alive=lambda: seen.append(1),
    )  # fmt: skip
    assert len(seen) == 3


def test_the_command_line_finds_the_figures_the_run_found_itself_and_adds_them(run):
    (own,) = read_lines(run.evals)
    done = leviathan("eval", run.path, "--rows", 9, "--step", 12)
    assert (done.code, done.err) == (0, "")
    again = list(read_lines(run.evals))[-1]
    assert again["step"] == 12
    assert again["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert again["sources"].keys() == own["sources"].keys()
    line = next(line.split() for line in done.out.splitlines() if line.startswith("all "))
    assert line[1:] == [
        f"{own['loss']:.4f}", f"{own['perplexity']:.2f}", f"{own['bits_per_byte']:.4f}", f"{own['tokens']:,}"
    ]  # fmt: skip
    assert "15–30" in done.out
    assert f"added to {run.evals}" in done.out


def test_all_rows_and_an_older_checkpoint_can_be_asked_for(run, capsys):
    evaluate_run(str(run.path), step=5, rows=None, device="cpu")
    newest = list(read_lines(run.evals))[-1]
    assert newest["step"] == 5
    assert newest["tokens"] > json.loads(run.evals.read_text().splitlines()[0])["tokens"]
    assert "at step 5 on held-out text" in capsys.readouterr().out


def test_shards_without_held_out_text_are_a_sentence(corpus, tmp_path):
    data = DataConfig(
        dir=str(tmp_path / "s"), heldout=0.0, sources={"letters": SourceConfig(path=str(corpus / "letters"))}
    )
    build_shards(data, tmp_path / "s", workers=1)
    config = small_config(tmp_path, tmp_path / "s", corpus)
    text = config.read_text().replace("heldout: 0.1", "heldout: 0.0")
    config.write_text("\n".join(line for line in text.splitlines() if "lists" not in line))
    folder = train_small(config, "train.steps=1")
    with pytest.raises(DataError, match=r"hold no held-out text .* build them with data\.heldout=0\.01"):
        evaluate_run(str(folder.path), step=None, rows=None, device="cpu")
