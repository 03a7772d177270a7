"""Files, folders and globs as documents: every format, every slice, and what is too much."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import os
import pickle
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline import corpora, documents, textfiles
from data_pipeline.config import SourceConfig
from data_pipeline.documents import Slice
from tests.data_pipeline.memory import memory_to_read
from tests.data_pipeline.reading import MIB, PROPERTY, lines, make_tar, read_all, texts

# ---- files, folders, globs


def test_a_folder_is_read_in_order_and_what_is_unknown_is_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "x.csv", ".hidden.txt", ".git/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    plan = corpora.plan("s", SourceConfig(path=str(tmp_path)), MIB)
    found = [document.name for part in plan.slices for document in corpora.read(part)]
    assert found == ["a.txt", "a/b/c.txt", "a/z.txt", "b.txt", "link.txt"]
    assert plan.skipped_files == 3
    assert len(plan.slices) == 1


def test_a_glob_names_files_from_where_it_begins(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/3.txt", "b/4.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.name for d in read_all(tmp_path / "*" / "*.txt")] == ["a/1.txt", "a/2.txt", "b/3.txt"]
    assert texts(f"{tmp_path}/**/[12].txt") == ["a/1.txt", "a/2.txt"]
    assert corpora.plan("s", SourceConfig(path=f"{tmp_path}/*/*"), MIB).skipped_files == 1
    (tmp_path / "a[1].txt").write_text("no glob")
    assert texts(tmp_path / "a[1].txt") == ["no glob"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("wikii.txt", ["no such file or folder", "did you mean", "wiki.txt"]),
        ("nothing/*.txt", ["holds none of .txt", "there are no files", "check the path"]),
        ("empty", ["holds none of .txt", "the 1 files there end otherwise"]),
        ("table.csv", ["of a kind that is not read here", ".jsonl.zst"]),
        ("pipe.txt", ["neither a file nor a folder"]),
    ],
)
def test_a_path_without_text_is_said_in_one_sentence(tmp_path: Path, says: Any, path: str, words: list[str]) -> None:
    (tmp_path / "wiki.txt").write_text("x")
    (tmp_path / "table.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.pdf").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError) as error:
        read_all(tmp_path / path)
    says(error, *words)


def test_many_small_files_share_a_slice_and_slices_can_be_sent(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text("x" * 100)
    plan = corpora.plan("s", SourceConfig(path=str(tmp_path)), 1000)
    assert [len(part.parts) for part in plan.slices] == [10] * 5
    assert pickle.loads(pickle.dumps(plan.slices)) == plan.slices
    json.dumps([dataclasses.asdict(part) for part in plan.slices])


def test_a_file_that_changes_after_the_plan_is_refused(tmp_path: Path, says: Any) -> None:
    (tmp_path / "a.txt").write_text("first")
    plan = corpora.plan("s", SourceConfig(path=str(tmp_path)), MIB)
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(DataError) as error:
        list(corpora.read(plan.slices[0]))
    says(error, "a.txt changed", "6 bytes, 5 when", "build again")


# ---- formats


def test_formats_agree(tmp_path: Path) -> None:
    wanted = ["one", "zwei\nlines", "三 💧", ""]
    raw = lines(*({"text": text, "n": 1} for text in wanted))
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:20]) + gzip.compress(raw[20:]))
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(raw[:20]) + compress(raw[20:]))
    (tmp_path / "a.txt").write_text("<|>".join(wanted[:3]) + "<|>")
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"n": [1] * 4, "text": pa.array(wanted, kind)}), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == wanted
    make_tar(tmp_path / "a.tar", [(f"{i}.txt", text.encode()) for i, text in enumerate(wanted)])
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.tar"):
        assert texts(tmp_path / name) == wanted, name
    assert texts(tmp_path / "a.txt", separator="<|>") == wanted[:3]
    assert read_all(tmp_path / "a.jsonl")[3].problem == "empty"


def test_names_say_where_a_document_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x"}, {"text": "y"}))
    (tmp_path / "b.txt").write_text("one--two")
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "c.parquet")
    make_tar(tmp_path / "d.tar", [("in/1.txt", b"t"), ("in/\x1b[2J.txt", b"u")])
    found = [document.name for document in read_all(tmp_path, separator="--")]
    assert found[:6] == ["a.jsonl@0", "a.jsonl@14", "b.txt@0", "b.txt@5", "c.parquet#0", "c.parquet#1"]
    assert found[6:] == ["d.tar/in/1.txt", "d.tar/in/?[2J.txt"]


def test_marks_of_byte_order_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "b"}) + b"\r\n  \n" + lines({"text": "c"}))
    assert texts(tmp_path) == ["a", "b", "c"]


def test_what_is_no_unicode_is_replaced_and_marked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \\ud800 pair"}\n{"text": "\xfe"}\n{"text": "\\ud83d\\ude00"}\n')
    pq.write_table(pa.table({"text": pa.array([b"p\xff", b"q"], pa.binary())}), tmp_path / "c.parquet")
    found = [(document.text, document.problem) for document in read_all(tmp_path)]
    assert found[:3] == [("a\ufffdb", "unicode"), ("half \ufffd pair", "unicode"), ("\ufffd", "unicode")]
    assert found[3:] == [("😀", None), ("p\ufffd", "unicode"), ("q", None)]


def test_only_whitespace_is_empty_and_nothing_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": " \n\t"}, {"text": None}, {"text": ""}, {"text": "."}))
    assert [document.problem for document in read_all(tmp_path / "a.jsonl")] == ["empty", "empty", "empty", None]
    pq.write_table(pa.table({"text": pa.array([None, "x"])}), tmp_path / "a.parquet")
    assert [document.problem for document in read_all(tmp_path / "a.parquet")] == ["empty", None]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{broken", ["found '{broken', not a JSON object"]),
        (b"[1]", ["found '[1]', not a JSON object"]),
        (b'{"body": "x", "id": 1}', ["no key 'text', found 'body', 'id'", "set the source's `field`"]),
        (b'{"text": 5}', ["'text' holds int, not text", "set the source's `field`"]),
        (b"[" * 100_000, ["not a JSON object"]),
    ],
)
@pytest.mark.parametrize("slice_bytes", [200, MIB])
def test_a_bad_line_is_named_by_file_and_number(
    tmp_path: Path, says: Any, line: bytes, words: list[str], slice_bytes: int
) -> None:
    good = lines(*({"text": f"document {i}"} for i in range(40)))
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "a.jsonl", slice_bytes)
    says(error, "a.jsonl:41: ", *words)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good + line + b"\n" + good))
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "b.jsonl.gz", slice_bytes)
    says(error, "b.jsonl.gz:41: ", *words)


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path, says: Any) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "a.parquet")
    says(error, "a.parquet has no column 'text', only body, n")
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "a.parquet", field="n")
    says(error, "'n' holds int64, not text")
    assert texts(tmp_path / "a.parquet", field="body") == ["x"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".tar"])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(1)
    records = [{"text": "".join(draw.choices("abcdefgh", k=200))} for _ in range(40)]
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".jsonl.gz":
        whole.write_bytes(gzip.compress(lines(*records)))
    elif suffix == ".jsonl.zst":
        whole.write_bytes(zstandard.ZstdCompressor().compress(lines(*records)))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), whole)
    else:
        make_tar(whole, [(f"{i}.txt", r["text"].encode()) for i, r in enumerate(records)], format=tarfile.USTAR_FORMAT)
    content = whole.read_bytes()
    assert len(texts(whole)) == 40
    # the last kilobytes of a tar are filling, and without them it is still whole
    end = len(content) if suffix != ".tar" else 40 * 1024
    cuts = [1, 511, 512, 1024, 5 * 1024, end - 512, end - 1, *(draw.randrange(1, end) for _ in range(20))]
    for cut in [cut for cut in cuts if cut < end]:
        (tmp_path / f"cut{suffix}").write_bytes(content[:cut])
        with pytest.raises(DataError):
            texts(tmp_path / f"cut{suffix}")


# ---- slices


DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r \u2028ab{"), max_size=30))


@given(wanted=DOCUMENTS, slice_bytes=st.integers(1, 300), ascii_only=st.booleans())
@PROPERTY
def test_every_line_is_read_once_whatever_the_slices(
    tmp_path: Path, wanted: list[str], slice_bytes: int, ascii_only: bool
) -> None:
    raw = "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in wanted)
    (tmp_path / "a.jsonl").write_bytes(raw.encode())
    assert texts(tmp_path / "a.jsonl", slice_bytes) == wanted


@given(
    raw=st.text(st.sampled_from("\nab é😀"), max_size=200),
    separator=st.sampled_from(["\n", "\n\n", "\n\n\n", "aa", "aba", "a\na", "é", "😀😀", "abab"]),
    slice_bytes=st.integers(1, 120),
)
@example(raw="a\n\n\nb", separator="\n\n", slice_bytes=2)
@example(raw="\n" * 9, separator="\n\n", slice_bytes=1)
@example(raw="x" * 50, separator="\n\n", slice_bytes=3)
@PROPERTY
def test_every_document_of_a_text_is_read_once_whatever_the_slices(
    tmp_path: Path, raw: str, separator: str, slice_bytes: int
) -> None:
    (tmp_path / "a.txt").write_bytes(raw.encode())
    wanted = raw.split(separator)
    found = read_all(tmp_path / "a.txt", slice_bytes, separator=separator)
    assert [document.text for document in found] == wanted[: len(wanted) - (wanted[-1] == "")]
    assert [document.name for document in found] == [
        document.name for document in read_all(tmp_path / "a.txt", separator=separator)
    ]


@given(st.text("ab\n", max_size=60), st.sampled_from(["\n", "\n\n", "a\na", "aba"]), st.integers(1, 9))
def test_a_file_in_a_store_is_cut_where_one_here_is(text: str, mark: str, look: int) -> None:
    content = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "_LOOK", look)
        for at in range(len(content) + 1):
            far = textfiles._Far(io.BytesIO(content), len(content))
            assert textfiles._next_start(far, mark.encode(), at) == textfiles._next_start(content, mark.encode(), at)


@pytest.mark.parametrize("separator", ["\n", "<|end|>"])
def test_a_document_may_be_longer_than_what_is_read_at_once(tmp_path: Path, separator: str) -> None:
    wanted = ["a" * (3 * MIB - 3), "b", "c" * (MIB + 5), "d" * (2 * MIB)]
    (tmp_path / "a.txt").write_text(separator.join(wanted))
    assert texts(tmp_path / "a.txt", separator=separator) == wanted
    assert texts(tmp_path / "a.txt", MIB, separator=separator) == wanted


def test_slices_of_one_file_are_even(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": "x" * (i % 50)} for i in range(2000))))
    plan = corpora.plan("s", SourceConfig(path=str(tmp_path / "a.jsonl")), 10_000)
    sizes = [part.text_bytes for part in plan.slices]
    assert sum(sizes) == (tmp_path / "a.jsonl").stat().st_size
    assert max(sizes) < 10_100 and min(sizes) > 8_000


@given(rows=st.integers(1, 60), group=st.integers(1, 20), slice_bytes=st.integers(1, 3000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_is_read_once_whatever_the_slices(tmp_path: Path, rows: int, group: int, slice_bytes: int) -> None:
    wanted = [f"row {number} " + "x" * number for number in range(rows)]
    pq.write_table(pa.table({"text": wanted}), tmp_path / "a.parquet", row_group_size=group)
    found = read_all(tmp_path / "a.parquet", slice_bytes)
    assert [document.text for document in found] == wanted
    assert [document.name for document in found] == [f"a.parquet#{number}" for number in range(rows)]


@given(wanted=DOCUMENTS, limit=st.integers(1, 400))
@PROPERTY
def test_a_limit_takes_the_first_text_and_no_more(tmp_path: Path, wanted: list[str], limit: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": text} for text in wanted), {"text": "last"}))
    (part,) = corpora.plan("s", SourceConfig(path=str(tmp_path / "a.jsonl")), MIB).slices
    taken = "".join(document.text for document in corpora.read(dataclasses.replace(part, limit_bytes=limit)))
    whole = "".join(wanted) + "last"
    assert whole.startswith(taken)
    assert len(taken.encode()) == min(limit, len(whole.encode())) or 0 <= limit - len(taken.encode()) < 4


# ---- too much


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_bomb_is_refused_before_it_has_grown(tmp_path: Path, says: Any, suffix: str) -> None:
    path = tmp_path / f"bomb{suffix}"
    zeros = b" " * MIB
    if suffix == ".jsonl.gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines(itertools.repeat(zeros, 300))
    else:
        compress = zstandard.ZstdCompressor().compressobj()
        path.write_bytes(b"".join(compress.compress(zeros) for _ in range(3000)) + compress.flush())
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        read_all(path)
    says(error, "has a document of more than 64 MiB", "cut it into smaller ones")
    assert time.monotonic() - start < 10
    said, kib = memory_to_read(path)
    assert said == [f"refused: {error.value}"]
    assert kib < 250_000


def test_a_document_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr("data_pipeline.textfiles.MAX_DOCUMENT", 1000)
    monkeypatch.setattr("data_pipeline.textfiles.MAX_TEXT", 5000)
    (tmp_path / "a.txt").write_text("x" * 2000)
    assert len(texts(tmp_path / "a.txt")) == 1
    with pytest.raises(DataError, match=r"a\.txt has a document of more than"):
        read_all(tmp_path / "a.txt", separator="|")
    (tmp_path / "b.txt").write_text("x" * 6000)
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "b.txt")
    says(error, "6,000 bytes and is one document", "`separator`")
    pq.write_table(pa.table({"text": ["ok", "y" * 2000]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1 has a document of more than"):
        read_all(tmp_path / "a.parquet")
    assert documents.MAX_DOCUMENT == 64 * MIB


def test_a_slice_is_a_plain_value() -> None:
    assert Slice("s", 0, ()) == Slice("s", 0, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Slice("s", 0, ()).number = 1  # type: ignore[misc]
