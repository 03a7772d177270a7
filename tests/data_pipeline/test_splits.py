"""What is held out, which documents stay of equal ones, and what is done with those that are no Unicode."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import DataError
from data_pipeline import corpora
from data_pipeline.build import build
from data_pipeline.config import SourceConfig
from data_pipeline.duplicates import repeated
from data_pipeline.inspect_shards import check
from tests.data_pipeline.building import Config, Hashes, children, decoded, jsonl


def test_few_documents_give_their_tails(tmp_path: Path, config: Config, prose: Callable[[int, int], str]) -> None:
    texts = [prose(n, 200) for n in range(5)]
    jsonl(tmp_path / "a.jsonl", [*texts, "é"])
    manifest = build(config({"s": tmp_path / "a.jsonl"}, heldout=0.1), tmp_path / "out", workers=1)
    assert manifest.sources["s"]["split"] == "tail" and manifest.sources["s"]["documents"] == 6
    heads, tails = decoded(tmp_path / "out", "s", "train"), decoded(tmp_path / "out", "s", "heldout")
    assert len(heads) == 6 and len(tails) == 5
    for name, tail in tails.items():
        head = heads[name.replace("#tail", "#head")]
        assert tail.endswith("¶") and "¶" not in head
        assert (head + tail)[:-1] in texts
        assert abs(len(tail) - 1 - 0.1 * len(head + tail)) <= 1
    # one character cannot be cut in two
    assert [text for name, text in heads.items() if "#" not in name] == ["é¶"]
    assert check(tmp_path / "out") == []


def test_of_every_source_something_is_held_out(tmp_path: Path, config: Config) -> None:
    jsonl(tmp_path / "a.jsonl", [f"document number {n} of many" for n in range(150)])
    for duplicates in ("drop", "keep"):
        for heldout, least, most in ((0.0, 0, 0), (1e-6, 1, 1), (0.1, 5, 30)):
            out = tmp_path / f"{duplicates}-{heldout}"
            data = config({"s": tmp_path / "a.jsonl"}, heldout=heldout, duplicates=duplicates)
            assert build(data, out, workers=1).sources["s"]["split"] == "hash"
            assert least <= len(decoded(out, "s", "heldout")) <= most


@pytest.mark.parametrize("few", [True, False])
def test_kept_duplicates_share_their_split(tmp_path: Path, config: Config, few: bool) -> None:
    texts = [f"a text number {n}" for n in range(4 if few else 120)] * 3
    jsonl(tmp_path / "a.jsonl", texts)
    data = config({"s": tmp_path / "a.jsonl"}, duplicates="keep", heldout=0.2, shard_mib=0.002)
    manifest = build(data, tmp_path / "out", workers=1)
    train, heldout = decoded(tmp_path / "out", "s", "train"), decoded(tmp_path / "out", "s", "heldout")
    assert manifest.sources["s"]["duplicates"] == 0
    assert manifest.sources["s"]["documents"] == len(texts)
    assert not set(train.values()) & set(heldout.values())
    assert set(train.values()) | set(heldout.values()) >= ({text + "¶" for text in texts} if not few else set())


def test_the_first_of_equal_documents_stays(tmp_path: Path, config: Config) -> None:
    jsonl(tmp_path / "a.jsonl", [f"{n % 130}" * 8 for n in range(400)])
    jsonl(tmp_path / "b.jsonl", ["0" * 8, "new " * 2])
    # the folder of the shards lies in the folder of the text
    data = config({"s": tmp_path, "t": tmp_path / "b.jsonl"}, heldout=0.0, shard_mib=0.003)
    manifest = build(data, tmp_path / "out", workers=1)
    assert len(corpora.plan("s", data.sources["s"], 1494).slices) > 3
    names = list(decoded(tmp_path / "out", "s", "train"))
    wanted = [d.name for part in corpora.plan("s", data.sources["s"], 1 << 20).slices for d in corpora.read(part)]
    assert names == wanted[:130] + wanted[401:]
    assert manifest.sources["s"]["duplicates"] == 271
    # a source is looked at by itself
    assert manifest.sources["t"]["duplicates"] == 0 and manifest.sources["t"]["documents"] == 2


def test_repeated_agrees_with_a_set() -> None:
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 6, (n, 2)).astype("<u8") for n in (5, 0, 17, 1, 30)]
    seen: set[tuple[int, ...]] = set()
    for array, found in zip(arrays, repeated(arrays), strict=True):
        wanted = []
        for number, row in enumerate(map(tuple, array.tolist())):
            if row in seen:
                wanted.append(number)
            seen.add(row)
        assert found.tolist() == wanted


@pytest.mark.parametrize(("policy", "documents"), [("replace", 3), ("skip", 2)])
def test_what_is_no_unicode_follows_the_policy(tmp_path: Path, config: Config, policy: str, documents: int) -> None:
    for name, content in (("a", b"good"), ("b", b"bad \xff"), ("c", b"good too"), ("d", b" \n"), ("e", b"")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "f.csv").write_bytes(b"no")
    manifest = build(config({"s": tmp_path}, unicode_errors=policy, heldout=0.0), tmp_path / "out", workers=1)
    counts = manifest.sources["s"]
    assert (counts["documents"], counts["empty"], counts["unicode_errors"]) == (documents, 2, 1)
    assert counts["skipped_files"] == 1
    assert ("bad \ufffd¶" in decoded(tmp_path / "out", "s", "train").values()) == (policy == "replace")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_slice_arrives_as_its_sentence(tmp_path: Path, config: Config, says: Any, workers: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"bad \xff")
    with pytest.raises(DataError) as error:
        build(config({"s": tmp_path}, unicode_errors="fail"), tmp_path / "out", workers=workers)
    says(error, "document 'a.txt' of source 's' is not UTF-8", "save it as UTF-8, or set data.unicode_errors")
    assert not children()


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("limit", [0.001, 0.004, 0.02, 50.0])
def test_a_limit_takes_the_start_of_a_source(
    tmp_path: Path, tale: Path, config: Config, hashes: Hashes, duplicates: str, limit: float
) -> None:
    source = SourceConfig(path=str(tale / "a.jsonl"), limit_mib=limit)
    data = config({"s": source}, duplicates=duplicates, heldout=0.0, shard_mib=0.004)
    build(data, tmp_path / "out", workers=1)
    with ThreadPoolExecutor(4) as pool:
        build(data, tmp_path / "four", workers=4, executor=pool)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "four")
    (whole,) = corpora.plan("s", SourceConfig(path=source.path), 1 << 20).slices
    texts, seen, left = [], set(), int(limit * (1 << 20))
    for document in corpora.read(whole):
        text = document.text.encode()[:left].decode(errors="ignore")
        left -= len(document.text.encode())
        if text.strip() and (text not in seen or duplicates == "keep"):
            texts.append(text + "¶")
        seen.add(text)
        if left <= 0:
            break
    assert list(decoded(tmp_path / "out", "s", "train").values()) == texts
