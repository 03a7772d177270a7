"""Embeddings of token ids, the file of clusters, and text without labels cut into its kinds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError, LeviathanError, UsageError
from configs.load import load
from data_pipeline import clusters as files
from data_pipeline import corpora, documents
from data_pipeline.build import build
from data_pipeline.clustering import CLUSTERS, CONFIG, FACTS, cluster
from data_pipeline.clusters import Clusters, Facts, bucket, buckets_of
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.embedding import Learner, _pairs_of, embed
from data_pipeline.tokenizer import MODEL, load_folder
from pretrain.config import RunConfig
from tests.data_pipeline.building import jsonl
from tests.data_pipeline.reading import MIB

FACTS_OF_BYTES = Facts("a" * 64, 257, 3, 128, 8, ("c0", "c1"))
MIXED = {
    "python": SourceConfig(path="stdlib", limit_mib=0.4), "cpp": SourceConfig(path="headers", limit_mib=0.4),
    "english": SourceConfig(path="docs", limit_mib=0.4), "names": SourceConfig(path="unicode", limit_mib=0.4),
}  # fmt: skip


# ---- embeddings


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 256), min_size=1, max_size=60), st.integers(1, 4), st.data())
def test_buckets_are_of_the_last_ids_alone_and_pieces_give_those_of_the_whole(
    ids: list[int], order: int, data: st.DataObject
) -> None:
    facts = Facts("", 257, order, 97, 4, ())
    whole = buckets_of(np.array(ids), facts)
    for place in range(len(ids)):
        gram = [257] * (order - 1) + ids[: place + 1]
        assert whole[place] == bucket([np.array(i) for i in gram[len(gram) - order :]], 97)
    cut = data.draw(st.integers(order, len(ids) + order)) if order <= len(ids) else len(ids)
    head, tail = np.array(ids[:cut]), np.array(ids[cut:])
    before = np.array(ids[cut - order + 1 : cut]) if cut >= order - 1 and len(tail) else None
    parts = [buckets_of(head, facts)] + ([buckets_of(tail, facts, before)] if len(tail) else [])
    assert np.array_equal(np.concatenate(parts), whole)


def test_tensors_have_the_buckets_of_arrays_up_to_the_largest_ids() -> None:
    draw = np.random.default_rng(0)
    gram = [draw.integers(0, 1 << 20, 5000) for _ in range(8)]
    expected = bucket(gram, files.BUCKETS)
    assert np.array_equal(bucket([torch.from_numpy(ids) for ids in gram], files.BUCKETS).numpy(), expected)
    assert expected.min() >= 0
    assert expected.max() < files.BUCKETS
    assert np.bincount(expected, minlength=files.BUCKETS).max() < 10, "ids are spread over all buckets"


def test_an_embedding_is_the_sum_of_its_rows_of_the_table_and_has_length_one() -> None:
    draw = np.random.default_rng(1)
    table = draw.standard_normal((128, 8))
    for count in (1, 5, 1024, 1025, 5000):
        ids = draw.integers(0, 257, count)
        total = table[buckets_of(ids, FACTS_OF_BYTES)].sum(0)
        np.testing.assert_allclose(embed(ids, table, FACTS_OF_BYTES), total / np.linalg.norm(total), atol=1e-6)
    assert embed(np.empty(0, np.int64), table, FACTS_OF_BYTES).tolist() == [0.0] * 8


def test_long_documents_are_counted_in_pieces_as_they_would_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline import embedding

    ids = np.random.default_rng(2).integers(0, 257, 10_000)
    counted: list[Counter[tuple[int, int]]] = []
    for block in (1 << 20, 2 * embedding.STRETCH):
        monkeypatch.setattr(embedding, "_BLOCK", block)
        of, first = Counter[tuple[int, int]](), 0
        for at, buckets, counts, stretches in _pairs_of(ids, FACTS_OF_BYTES):
            of.update({(first + int(a), int(b)): int(c) for a, b, c in zip(at, buckets, counts)})
            first += stretches
        counted.append(of)
    assert counted[0] == counted[1]
    assert counted[0].total() == len(ids)


def test_the_table_is_idf_times_the_right_singular_vectors_of_tf_idf() -> None:
    draw, facts = np.random.default_rng(3), Facts("", 50, 1, 64, 6, ())
    learner, counts = Learner(facts), []
    for topic in range(30):
        ids = draw.choice(np.arange(50), 200, p=np.roll(np.arange(1, 51) / 1275, 17 * (topic % 3)))
        learner.add(ids)
        counts.append(np.bincount(buckets_of(ids, facts), minlength=64))
    counts_NH = np.array(counts, dtype=np.float64)
    idf = np.log((1 + 30) / (1 + (counts_NH > 0).sum(0))) + 1
    rows = counts_NH * idf
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    _, _, vectors = np.linalg.svd(rows, full_matrices=False)
    table = learner.table(0).astype(np.float64) / idf[:, None]
    # three topics: three directions stand out; each is found up to its sign
    for number in range(3):
        assert abs(table[:, number] @ vectors[number]) > 0.999
    assert np.array_equal(learner.table(0), learner.table(0))


def test_what_is_learned_from_is_bounded_and_spread_over_the_corpus() -> None:
    learner = Learner(FACTS_OF_BYTES, pairs=2000)
    draw = np.random.default_rng(4)
    for _ in range(300):
        learner.add(draw.integers(0, 257, 100))
    assert learner._pairs <= 2000
    numbers = np.array([number for number, _, _ in learner._kept])
    assert set(np.diff(numbers)) == {learner._every}
    assert numbers.max() > 300 - learner._every
    assert np.isfinite(learner.table(0)).all()


def test_few_or_equal_documents_leave_directions_that_the_text_has_not_at_zero() -> None:
    learner = Learner(FACTS_OF_BYTES)
    for _ in range(3):
        learner.add(np.frombuffer(b"the same text", np.uint8))
    table = learner.table(0)
    assert np.isfinite(table).all()
    assert (np.abs(table).sum(0) > 0).tolist() == [True] + [False] * 7


# ---- the file


def test_a_file_of_clusters_comes_back_and_a_damaged_one_is_told(tmp_path: Path, says: Any) -> None:
    table, centres = np.ones((128, 8), np.float32), np.eye(2, 8, dtype=np.float32)
    path = tmp_path / "clusters.safetensors"
    files.save(path, Clusters(FACTS_OF_BYTES, table, centres))
    back = files.load(path)
    assert back.facts == FACTS_OF_BYTES
    assert np.array_equal(back.table_HE, table) and np.array_equal(back.centres_KE, centres)
    whole = path.read_bytes()
    with pytest.raises(ConfigError) as missing:
        files.load(tmp_path / "absent.safetensors")
    says(missing, "there is no file of clusters", "data cluster", "model.ensemble.clusters.file")
    for damaged in (whole[:100], whole[:-9], b"", b"x" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as error:
            files.load(path)
        says(error, "damaged")
    from safetensors.numpy import save

    path.write_bytes(save({"table": table}))
    with pytest.raises(DataError, match="holds no clusters"):
        files.load(path)
    files.save(path, Clusters(FACTS_OF_BYTES, table[:7], centres))
    with pytest.raises(DataError, match="damaged"):
        files.load(path)


# ---- a corpus


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four kinds of real text in four clusters, and what was told of them."""
    out = tmp_path_factory.mktemp("mixed") / "clusters"
    cluster(DataConfig(sources=MIXED), out, into=4)
    return out


def read_back(folder: Path) -> list[dict[str, str]]:
    with open(folder / "documents.jsonl", "rb") as file:
        return [json.loads(line) for line in file]


def test_four_kinds_of_real_text_are_told_apart_without_labels(mixed: Path) -> None:
    told = json.loads((mixed / FACTS).read_text())["clusters"]
    right = sum(max(one["shares"].values()) * one["tokens"] for one in told)
    assert right / sum(one["tokens"] for one in told) > 0.85
    best = {max(one["shares"], key=one["shares"].get) for one in told}
    assert best == set(MIXED), "each kind is what one cluster mostly is"
    for one in told:
        assert one["central"]


def test_a_hundred_bytes_from_the_middle_of_a_document_are_nearest_to_its_own_cluster(mixed: Path) -> None:
    found, right = files.load(mixed / CLUSTERS), []
    for k in range(4):
        for one in read_back(mixed / f"c{k}")[::3]:
            content = one["text"].encode()
            ids = np.frombuffer(content[len(content) // 2 :][:100], np.uint8)
            if len(ids) == 100:
                e = embed(ids, found.table_HE, found.facts)
                right.append(int(np.square(e - found.centres_KE).sum(1).argmin()) == k)
    assert len(right) > 50
    assert np.mean(right) > 0.8


def test_every_document_is_in_exactly_one_cluster_word_for_word(mixed: Path) -> None:
    before: Counter[tuple[str, str]] = Counter()
    for name, source in MIXED.items():
        left = int(0.4 * MIB)
        for part in corpora.plan(name, source, MIB).slices:
            for found in corpora.read(part):
                if left > 0 and found.problem != "empty":
                    before[name, documents.cut_text(found.text, left)] += 1
                left -= len(found.text.encode())
    after = Counter((one["source"], one["text"]) for k in range(4) for one in read_back(mixed / f"c{k}"))
    assert after == before


def test_shares_are_even_and_the_same_command_makes_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    made = cluster(DataConfig(sources=MIXED), again, into=4)
    tokens = [one.tokens for one in made.clusters]
    assert max(tokens) < 1.2 * min(tokens)
    for name in (CLUSTERS, FACTS, *(f"c{k}/documents.jsonl" for k in range(4))):
        assert (again / name).read_bytes() == (mixed / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"], "no drafts are left"


def test_what_is_written_is_built_as_it_is_and_weighs_what_it_weighed(tmp_path: Path, prose: Any) -> None:
    jsonl(tmp_path / "a.jsonl", [*(prose(n, 60) for n in range(150)), "", "  "])
    jsonl(tmp_path / "b.jsonl", ["0 1 2 3 4 5 6 7 8 9 " * 20 + str(n) for n in range(150)])
    (tmp_path / "own.yaml").write_text(
        f"data: {{tokenizer: 'sp:300', sources: {{a: {{path: {tmp_path}/a.jsonl, weight: 3}},"
        f" c9: {{path: {tmp_path}/b.jsonl}}, other: {{path: {tmp_path}/b.jsonl}}}}}}"
    )
    told: dict[str, list[float]] = {}
    out = tmp_path / "new" / "out"
    whole = load(RunConfig, [tmp_path / "own.yaml"]).data

    def tell(what: str, done: float, total: float) -> None:
        told.setdefault(what, []).append(done / total)

    made = cluster(whole, out, into=2, source="a", progress=tell)
    assert list(told) == ["sampling", "reading", "learning", "embedding", "grouping", "writing"]
    assert all(all(0 < part <= 1 for part in parts) and parts == sorted(parts) for parts in told.values())
    assert (made.documents, made.empty) == (150, 2)
    assert [one.name for one in made.clusters] == ["cc0", "cc1"], "no name is a source's"
    merged = load(RunConfig, [tmp_path / "own.yaml", out / CONFIG]).data
    assert list(merged.sources) == ["c9", "other", "cc0", "cc1"], "what was clustered is replaced, the rest stays"
    assert merged.sources["cc0"].weight + merged.sources["cc1"].weight == pytest.approx(3)
    assert Path(merged.tokenizer) == out / MODEL
    manifest = build(merged, Path(merged.dir), workers=1)
    assert sum(manifest.sources[f"cc{k}"]["documents"] for k in range(2)) == 150
    assert manifest.tokenizer.sha256 == load_folder(out).sha256 == files.load(out / CLUSTERS).facts.tokenizer


def test_a_document_that_is_too_long_for_a_line_is_kept_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import clustering

    monkeypatch.setattr(clustering, "MAX_DOCUMENT", 1000)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{'ab' if number % 2 else 'yz'} " * (100 + 300 * (number < 2)))
    out = tmp_path / "out"
    cluster(DataConfig(sources={"s": SourceConfig(path=str(tmp_path / "*.txt"))}), out, into=2)
    plans = [corpora.plan("s", SourceConfig(path=str(out / f"c{k}")), MIB) for k in range(2)]
    texts = [found.text for plan in plans for part in plan.slices for found in corpora.read(part)]
    assert sorted(texts) == sorted(path.read_text() for path in tmp_path.glob("*.txt"))


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"into": 1}, UsageError, ["--into 1", "2 or more"]),
        ({"into": 7}, DataError, ["6 documents for 7 clusters", "fewer clusters"]),
        ({"into": 2, "source": "web"}, UsageError, ["no source 'web'", "has s"]),
        ({"into": 2, "out": "."}, UsageError, ["already there", "--out"]),
    ],
)
def test_what_cannot_be_clustered_is_said_in_a_sentence_and_nothing_is_left(
    tmp_path: Path, says: Any, keys: dict[str, Any], kind: type[LeviathanError], words: list[str]
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    jsonl(text / "a.jsonl", ["one", "two", "three", "four", "five", "six", ""])
    out = tmp_path / keys.pop("out", "out")
    with pytest.raises(kind) as error:
        cluster(DataConfig(sources={"s": SourceConfig(path=str(text))}), out, **keys)
    says(error, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_text_that_changes_between_two_passes_is_refused(tmp_path: Path, says: Any) -> None:
    path = tmp_path / "a.jsonl"
    jsonl(path, [f"text {n}" for n in range(9)])

    def add(what: str, done: float, total: float) -> None:
        if what == "learning":
            with open(path, "a") as file:
                file.write('{"text": "more"}\n')

    with pytest.raises(DataError) as error:
        cluster(DataConfig(sources={"s": SourceConfig(path=str(path))}), tmp_path / "out", into=2, progress=add)
    says(error, "changed", "again")
    assert not (tmp_path / "out").exists()


def test_a_source_set_to_nothing_by_a_later_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {sources: {web: {path: docs}, code: {path: stdlib}}}")
    (tmp_path / "b.yaml").write_text("data: {sources: {web: ~}}")
    assert list(load(RunConfig, [tmp_path / "a.yaml", tmp_path / "b.yaml"]).data.sources) == ["code"]
    with pytest.raises(ConfigError, match="sources is"):
        load(RunConfig, [tmp_path / "a.yaml"], ["data.sources=[a]"])
