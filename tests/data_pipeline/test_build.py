from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset

from configs.errors import ConfigError, DataError, LeviathanError, UsageError
from data_pipeline import build as builder
from data_pipeline import corpora, tasks
from data_pipeline.build import Progress, build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.duplicates import repeated
from data_pipeline.inspect_shards import check, load_manifest, show
from data_pipeline.manifest import Manifest, Split
from data_pipeline.output import output_of
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import load_folder

Config = Callable[..., DataConfig]
Hashes = Callable[[Path], dict[str, str]]


def decoded(folder: Path, source: str, split: Split) -> dict[str, str]:
    """Every document of a source by its name, as its tokens say; eod becomes ¶."""
    manifest, tokenizer = load_manifest(folder), load_folder(folder)
    found: dict[str, str] = {}
    for row in manifest.rows_of(source, split):
        info = manifest.shard(int(row))
        shard = Shard(folder / info.name, info)
        ids = np.empty(shard.tokens, dtype=np.int64)
        shard.copy(0, shard.tokens, ids)
        start = 0
        for name, (end, _) in zip(shard.names(), shard.ends().tolist(), strict=True):
            document = ids[start:end]
            found[name] = tokenizer.decode(document) + "¶" * int((document == tokenizer.eod).sum())
            assert (document[:-1] != tokenizer.eod).all()
            start = end
    return found


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path: Path, prose: Callable[[int, int], str]) -> Path:
    """A source of two files: 400 documents, of which every tenth is told twice, and 20 long ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [prose(n, 20 + n % 30) for n in range(400)]
    texts[9::10] = texts[4:204:5]
    jsonl(folder / "a.jsonl", texts)
    (folder / "b.txt").write_text("<|>".join(prose(10_000 + n, 900) for n in range(20)))
    return folder


@pytest.fixture
def data(corpus: Path, config: Config) -> DataConfig:
    """Some twenty slices of two sources."""
    source = SourceConfig(path=str(corpus), separator="<|>")
    return config({"tale": source, "again": source}, shard_mib=0.04, heldout=0.05)


def test_every_document_is_in_one_split_with_its_end(tmp_path: Path, corpus: Path, config: Config) -> None:
    source = SourceConfig(path=str(corpus), separator="<|>")
    manifest = build(config({"tale": source}, shard_mib=0.04, heldout=0.1), tmp_path / "out", workers=1)
    texts = {
        document.name: document.text
        for part in corpora.plan("tale", source, 1 << 20).slices
        for document in corpora.read(part)
    }
    train, heldout = decoded(tmp_path / "out", "tale", "train"), decoded(tmp_path / "out", "tale", "heldout")
    assert not train.keys() & heldout.keys()
    found = train | heldout
    assert all(found[name] == texts[name] + "¶" for name in found)
    assert set(found.values()) == {text + "¶" for text in texts.values()}
    assert len(found) == len(set(texts.values())) < len(texts)
    assert 15 < len(heldout) < 70
    counts = manifest.sources["tale"]
    assert (counts["documents"], counts["duplicates"]) == (len(found), len(texts) - len(found))
    assert counts["text_bytes"] == sum(len(text.encode()) - 2 for text in found.values())
    assert counts["train_tokens"] == manifest.total("tokens", "tale", "train")
    assert counts["split"] == "hash" and counts["path"] == str(corpus)
    assert check(tmp_path / "out") == []


def test_shards_are_named_and_listed_in_the_order_of_the_text(tmp_path: Path, data: DataConfig) -> None:
    manifest = build(data, tmp_path / "out", workers=1)
    names = manifest.table["name"].to_pylist()
    assert names[0] == "tale-train-00000-00.tar"
    assert names == sorted(names, key=lambda name: ("again" in name, "heldout" in name, name))
    assert {"tale-heldout-00000-00.tar", "again-train-00003-00.tar"} <= set(names)
    assert manifest.source_names() == ["tale", "again"]
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == {*names, "manifest.json", "shards.parquet", "tokenizer.json"}


def test_a_slice_that_is_too_much_for_a_shard_has_several(tmp_path: Path, config: Config) -> None:
    # what is no Unicode grows to three bytes, so the text is longer than its file
    (tmp_path / "a.txt").write_bytes(b"\n".join(b"\xff" * (n % 3 + 1) for n in range(4000)))
    source = SourceConfig(path=str(tmp_path / "a.txt"), separator="\n")
    manifest = build(config({"s": source}, shard_mib=0.01, duplicates="keep", heldout=0.0), tmp_path / "out", workers=1)
    names = manifest.table["name"].to_pylist()
    assert "s-train-00000-01.tar" in names
    sizes = manifest.column("tokens") * 2
    assert max(sizes) <= 0.01 * (1 << 20) + 20
    assert int(manifest.column("documents").sum()) == 4000


def test_webdataset_reads_equal_tokens(tmp_path: Path, data: DataConfig) -> None:
    manifest = build(data, tmp_path / "out", workers=1)
    names = [manifest.shard(int(row)).name for row in manifest.rows_of("tale", "train")]
    samples = webdataset.WebDataset([str(tmp_path / "out" / name) for name in names], shardshuffle=False)
    plain = np.concatenate([np.frombuffer(sample["tokens.u16"], "<u2") for sample in samples])
    text = load_folder(tmp_path / "out").decode_bytes(plain)
    assert text == "".join(decoded(tmp_path / "out", "tale", "train").values()).replace("¶", "").encode()


# ---- the same bytes


@pytest.mark.timeout(100)
def test_any_number_of_workers_gives_equal_bytes(tmp_path: Path, data: DataConfig, hashes: Hashes) -> None:
    data = data.model_copy(update={"tokenizer": "sp:300", "tokenizer_sample_mib": 0.02})
    found = []
    for workers in (1, 2, 3):
        build(data, tmp_path / f"{workers}", workers=workers)
        found.append(hashes(tmp_path / f"{workers}"))
    assert len(found[0]) > 30 and "tokenizer.model" in found[0]
    assert found[0] == found[1] == found[2]


def test_any_executor_gives_equal_bytes(tmp_path: Path, data: DataConfig, hashes: Hashes) -> None:
    build(data, tmp_path / "a", workers=1)
    with ThreadPoolExecutor(3) as pool:
        build(data, tmp_path / "b", workers=3, executor=pool)
        assert pool.submit(int).result() == 0  # whoever brings an executor keeps it
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


class StopError(Exception):
    """The build is left in the middle."""


@pytest.mark.parametrize("after", [1, 3, 8, 24, 26, 30, 40])
def test_a_build_that_was_stopped_goes_on_to_equal_bytes(
    tmp_path: Path, data: DataConfig, hashes: Hashes, after: int
) -> None:
    build(data, tmp_path / "whole", workers=1)
    told: list[Progress] = []

    def stop(progress: Progress) -> None:
        told.append(progress)
        if len(told) == after:
            raise StopError

    with pytest.raises(StopError):
        build(data, tmp_path / "out", workers=1, progress=stop)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "out" / ".tale-train-00000-00.tar.4242.tmp").write_bytes(b"half a shard")
    (tmp_path / "out" / ".build" / ".scan-tale-00000.json.4242.tmp").write_bytes(b"{")
    again: list[Progress] = []
    build(data, tmp_path / "out", workers=1, progress=again.append)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    kept = {phase: max(p.kept_bytes for p in again if p.phase == phase) for phase in ("scan", "encode")}
    done = {phase: max((p.done_bytes for p in told if p.phase == phase), default=0) for phase in ("scan", "encode")}
    assert kept == done
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_torn_and_missing_shards_are_built_again_and_no_others(
    tmp_path: Path, data: DataConfig, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(data, out, workers=1)
    wanted = hashes(out)
    (out / "tale-train-00001-00.tar").unlink()
    torn = out / "again-train-00002-00.tar"
    torn.write_bytes(torn.read_bytes()[:-100])
    flipped = bytearray((out / "tale-train-00003-00.tar").read_bytes())
    flipped[5000] ^= 1
    (out / "tale-train-00003-00.tar").write_bytes(flipped)
    (out / ".build" / "encode-again-00004.json").write_bytes(b"{torn")
    worked = []
    work = tasks.Encode.work
    monkeypatch.setattr(tasks.Encode, "work", lambda task: worked.append(task.name) or work(task))
    build(data, out, workers=1)
    expected = ["encode-tale-00001", "encode-tale-00003", "encode-again-00002", "encode-again-00004"]
    assert worked == expected
    assert hashes(out) == wanted


def test_a_finished_build_is_found_finished(tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(data, tmp_path / "out", workers=1)
    monkeypatch.setattr(tasks, "run", None)
    second = build(data, tmp_path / "out", workers=1, progress=lambda progress: pytest.fail("work was done"))
    assert second.fingerprint == first.fingerprint and second.sources == first.sources
    assert second.table.equals(first.table)


@pytest.mark.timeout(100)
def test_a_killed_worker_is_named_and_the_next_build_goes_on(
    tmp_path: Path, data: DataConfig, hashes: Hashes, says: Any
) -> None:
    build(data, tmp_path / "whole", workers=1)
    killed = []

    def kill(progress: Progress) -> None:
        if progress.phase == "encode" and not killed:
            workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
            killed.append(workers[0])
            os.kill(workers[0].pid, signal.SIGKILL)

    with pytest.raises(LeviathanError) as error:
        build(data, tmp_path / "out", workers=2, progress=kill)
    says(error, "a worker process died at slice", "of source", "build again, finished slices are kept")
    assert killed and not _children()
    assert not (tmp_path / "out" / "manifest.json").exists()
    again: list[Progress] = []
    build(data, tmp_path / "out", workers=1, progress=again.append)
    assert again[-1].kept_bytes > 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.timeout(100)
def test_an_interrupt_leaves_no_process_and_no_draft(tmp_path: Path, data: DataConfig) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(data, tmp_path / "out", workers=2, progress=interrupt)
    assert not _children()
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.timeout(100)
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path, corpus: Path) -> None:
    script = f"""
import os, sys
from pathlib import Path
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
if __name__ == "__main__":
    data = DataConfig(sources={{"s": SourceConfig(path={str(corpus)!r})}}, shard_mib=0.04)
    build(data, Path({str(tmp_path / "out")!r}), workers=2, progress=lambda p: os.kill(os.getpid(), 9))
"""
    (tmp_path / "run.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "BUILD_OF_TEST": str(tmp_path)}
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    done = subprocess.run([sys.executable, tmp_path / "run.py"], env=env, check=False, **quiet)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while left := [process for process in psutil.process_iter() if _runs_for(process, str(tmp_path))]:
        assert time.monotonic() < deadline, f"{left} outlive their parent"
        time.sleep(0.1)


def _runs_for(process: psutil.Process, test: str) -> bool:
    try:
        return process.environ().get("BUILD_OF_TEST") == test
    except (psutil.Error, OSError):
        return False


# ---- held out, duplicates, policies


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
    assert not _children()


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("limit", [0.001, 0.004, 0.02, 50.0])
def test_a_limit_takes_the_start_of_a_source(
    tmp_path: Path, corpus: Path, config: Config, hashes: Hashes, duplicates: str, limit: float
) -> None:
    source = SourceConfig(path=str(corpus / "a.jsonl"), limit_mib=limit)
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


# ---- what cannot be


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_a_source_without_text_is_said(tmp_path: Path, config: Config, says: Any, duplicates: str) -> None:
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(DataError) as error:
        build(config({"s": tmp_path}, duplicates=duplicates), tmp_path / "out", workers=1)
    says(error, "source 's' is empty", "gave 0 documents", "1 documents hold only whitespace", "check its path")


def test_no_sources_and_wrong_tokenizers_are_said_before_any_work(tmp_path: Path, config: Config) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty; name a source"):
        build(config({}), tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match="did you mean 'bytes'"):
        build(config({"s": "stdlib"}, tokenizer="byte"), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heldout": 0.5}, ["heldout: 0.05 there, 0.5 now"]),
        ({"tokenizer": "sp:300"}, ['tokenizer.spec: "bytes" there, "sp:300" now']),
        ({"shard_mib": 8.0}, ["shard_mib: 0.04 there, 8.0 now"]),
        ({"duplicates": "keep"}, ['duplicates: "drop" there, "keep" now']),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_build_is_left_alone(
    tmp_path: Path,
    data: DataConfig,
    hashes: Hashes,
    says: Any,
    change: dict[str, Any],
    words: list[str],
    finished: bool,
) -> None:
    out = tmp_path / "out"
    build(data, out, workers=1)
    if not finished:
        (out / "manifest.json").unlink()
    before = hashes(out)
    with pytest.raises(ConfigError) as error:
        build(data.model_copy(update=change), out, workers=1)
    says(error, "holds shards of another build", *words, "choose another data.dir, or build with rebuild")
    assert hashes(out) == before


def test_changed_files_are_another_build(tmp_path: Path, corpus: Path, data: DataConfig, says: Any) -> None:
    build(data, tmp_path / "out", workers=1)
    (corpus / "c.txt").write_text("one more")
    with pytest.raises(ConfigError) as error:
        build(data, tmp_path / "out", workers=1)
    says(error, "sources.tale.files: 2 there, 3 now", "sources.again.bytes:")
    (corpus / "c.txt").rename(corpus / "d.txt")
    build(data, tmp_path / "out", workers=1, rebuild=True)
    (corpus / "d.txt").rename(corpus / "c.txt")
    with pytest.raises(ConfigError, match=r"sources\.tale\.files: others than now"):
        build(data, tmp_path / "out", workers=1)


def test_weights_and_places_may_change(tmp_path: Path, data: DataConfig) -> None:
    build(data, tmp_path / "out", workers=1)
    sources = {name: source.model_copy(update={"weight": 7.0}) for name, source in data.sources.items()}
    changed = data.model_copy(update={"sources": sources, "window": 3, "cache_gib": 1.0})
    build(changed, tmp_path / "out", workers=1, progress=lambda progress: pytest.fail("work was done"))


def test_rebuild_replaces_what_builds_wrote_and_nothing_else(tmp_path: Path, data: DataConfig, hashes: Hashes) -> None:
    out = tmp_path / "out"
    build(data.model_copy(update={"tokenizer": "sp:300", "shard_mib": 0.01}), out, workers=1)
    (out / "notes.md").write_text("mine")
    (out / "other-train.tar").write_text("mine")
    build(data, out, workers=1, rebuild=True)
    build(data, tmp_path / "fresh", workers=1)
    mine = {"notes.md", "other-train.tar"}
    assert {name: digest for name, digest in hashes(out).items() if name not in mine} == hashes(tmp_path / "fresh")
    assert mine <= set(hashes(out))


def test_shards_from_elsewhere_are_not_overwritten(tmp_path: Path, data: DataConfig, hashes: Hashes) -> None:
    build(data, tmp_path / "a", workers=1)
    shutil.rmtree(tmp_path / "a" / ".build")
    before = hashes(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds shards, and no plan says what they were made from"):
        build(data, tmp_path / "a", workers=1)
    assert hashes(tmp_path / "a") == before


def test_two_builds_do_not_share_a_folder(tmp_path: Path, data: DataConfig) -> None:
    with output_of(tmp_path / "out").alone(), pytest.raises(ConfigError, match="another build is at work in"):
        build(data, tmp_path / "out", workers=1)
    build(data, tmp_path / "out", workers=1)


def test_text_that_changes_between_scan_and_encoding_is_found(tmp_path: Path, config: Config, says: Any) -> None:
    jsonl(tmp_path / "a.jsonl", ["one", "two"])

    def change(progress: Progress) -> None:
        jsonl(tmp_path / "a.jsonl", ["one", "owt"])

    with pytest.raises(DataError) as error:
        build(config({"s": tmp_path / "a.jsonl"}), tmp_path / "out", workers=1, progress=change)
    says(error, "slice 0 of source 's' changed since it was scanned", "rebuild")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_full_disk_is_said_and_leaves_no_draft(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    written = 0
    room = 1 << 30

    def write(handle: int) -> None:
        nonlocal written
        written += 1
        if written > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", write)
    build(data, tmp_path / "whole", workers=1)
    total = written
    for rest, what in ((total, "the plan"), (total - 9, "slice"), (total // 2, "slice"), (1, "the plan")):
        written, room = 0, total - rest
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(LeviathanError) as error:
            build(data, tmp_path / "out", workers=1)
        says(error, "is full", f"while writing {what}", "make room and build again", "finished slices are kept")
        assert not list((tmp_path / "out").rglob("*.tmp"))
    room = 1 << 30
    monkeypatch.setattr(builder, "free_bytes", lambda folder: 1000)
    with pytest.raises(LeviathanError) as error:
        build(data, tmp_path / "new", workers=1)
    says(error, "the shards need at least", "1.0 kB are free", "make room")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); choose another data\.dir"):
        build(data, tmp_path / "file" / "out", workers=1)


def test_secrets_of_urls_are_not_written_down(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(5)])

    class Web:
        def info(self, url: str) -> dict[str, Any]:
            assert url.endswith("?sig=SECRET")
            return {"size": file.stat().st_size}

        def open(self, url: str, mode: str, **options: Any) -> Any:
            return file.open(mode)

    monkeypatch.setattr("data_pipeline.places.filesystem", lambda url: Web())
    out = tmp_path / "out"
    manifest = build(config({"s": "https://me:SECRET@host/a.jsonl?sig=SECRET"}), out, workers=1)
    assert manifest.sources["s"]["path"] == "https://host/a.jsonl"
    assert not [path for path in out.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]


# ---- progress, samples, looking at shards


def test_progress_tells_how_far_each_phase_is(tmp_path: Path, data: DataConfig) -> None:
    told: list[Progress] = []
    manifest = build(data.model_copy(update={"tokenizer": "sp:300"}), tmp_path / "out", workers=1, progress=told.append)
    phases = list(dict.fromkeys(progress.phase for progress in told))
    assert phases == ["scan", "sample", "train tokenizer", "encode"]
    for phase in phases:
        of_phase = [progress for progress in told if progress.phase == phase]
        assert [p.done_bytes for p in of_phase] == sorted(p.done_bytes for p in of_phase)
        assert of_phase[-1].done_bytes == of_phase[-1].total_bytes > 0
        assert all(progress.kept_bytes == 0 for progress in of_phase)
    last = told[-1]
    assert last.shards == manifest.table.num_rows
    assert last.tokens == manifest.column("tokens").sum()
    assert last.documents == sum(counts["documents"] for counts in manifest.sources.values())


def test_a_sample_is_spread_over_sources_and_holds_nothing_held_out(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in "ab":
        jsonl(tmp_path / f"{source}.jsonl", [f"{source}{n:04d} " + f"{source}{n} " * 40 for n in range(2000)])
    taken: list[str] = []
    make = builder.tokenizer.make
    monkeypatch.setattr(builder.tokenizer, "make", lambda spec, texts: make("bytes", taken.extend(texts) or []))
    data = config(
        {s: tmp_path / f"{s}.jsonl" for s in "ab"}, tokenizer="sp:4096", tokenizer_sample_mib=0.05, shard_mib=0.2
    )
    build(data.model_copy(update={"heldout": 0.3}), tmp_path / "out", workers=1)
    assert 0.8 < sum(map(len, taken)) / (0.05 * (1 << 20)) <= 1.01
    heldout = {*decoded(tmp_path / "out", "a", "heldout").values(), *decoded(tmp_path / "out", "b", "heldout").values()}
    starts = {text[:6] for text in heldout}
    assert len(starts) > 500 and not [text for text in taken if text[:6] in starts]
    for source in "ab":
        numbers = [int(text[1:5]) for text in taken if text[0] == source]
        assert len(numbers) > 20
        assert min(numbers) < 200 and max(numbers) > 1800


@pytest.fixture
def built(tmp_path: Path, data: DataConfig) -> tuple[Path, Manifest]:
    return tmp_path / "out", build(data, tmp_path / "out", workers=1)


def test_check_finds_nothing_wrong_and_says_how_far_it_is(built: tuple[Path, Manifest]) -> None:
    told: list[tuple[int, int]] = []
    assert check(built[0], lambda done, total: told.append((done, total))) == []
    assert told[-1][0] == told[-1][1] == built[1].column("bytes").sum()
    assert len(told) == built[1].table.num_rows


def test_check_finds_every_fault_at_once(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    names = manifest.table["name"].to_pylist()
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(b"")
    content = bytearray((folder / names[2]).read_bytes())
    content[len(content) // 2] ^= 8
    (folder / names[2]).write_bytes(content)
    shutil.copy(folder / names[4], folder / names[3])
    (folder / "tokenizer.json").unlink()
    problems = check(folder)
    assert len(problems) == 5
    assert "no tokenizer in" in problems[0]
    for name, problem in zip(names, problems[1:]):
        assert name in problem and "\n" not in problem
    assert check(folder / "nowhere")[0].startswith("no shards in")


def test_random_damage_to_a_folder_never_goes_unnoticed(built: tuple[Path, Manifest]) -> None:
    folder, draw = built[0], random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for _ in range(70):
        path = draw.choice(files)
        whole = path.read_bytes()
        kind = draw.choice(["flip", "flip", "cut", "delete", "swap"])
        if kind == "flip":
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
        elif kind == "cut":
            path.write_bytes(whole[: draw.randrange(len(whole))])
        elif kind == "swap":
            path.write_bytes(next(other for other in files if other.read_bytes() != whole).read_bytes())
        else:
            path.unlink()
        if path.name != "tokenizer.json" or kind != "flip":
            assert check(folder), (path.name, kind)
        path.write_bytes(whole)
    assert check(folder) == []


def test_a_shard_without_documents_is_refused(built: tuple[Path, Manifest]) -> None:
    from data_pipeline import manifest as manifests
    from data_pipeline.shards import ShardWriter

    folder, manifest = built
    empty = ShardWriter(folder / "tale-train-99999-00.tar", "tale", "train", 257).close()
    shards = [manifest.shard(row) for row in range(manifest.table.num_rows)]
    header, table = manifests.encode(manifests.make(manifest.tokenizer, [*shards, empty], manifest.sources))
    (folder / "manifest.json").write_bytes(header)
    (folder / "shards.parquet").write_bytes(table)
    assert check(folder) == ["shard tale-train-99999-00.tar has 0 documents; build it again"]


def test_samples_are_shown_from_all_over_a_source(built: tuple[Path, Manifest], corpus: Path) -> None:
    folder = built[0]
    found = list(show(folder, "tale", "train", 6))
    wanted = decoded(folder, "tale", "train")
    assert len(found) == 6
    assert found[0].name == "a.jsonl@0" and found[-1].name.startswith("b.txt@")
    assert all(wanted[name].startswith(text) and tokens > 1 for name, text, tokens in found)
    assert len(list(show(folder, "tale", "heldout", 10_000))) == len(decoded(folder, "tale", "heldout"))
    assert list(show(folder, "tale", "train", 0)) == []
    with pytest.raises(UsageError, match=r"no source 'tail' in .*; did you mean 'tale'"):
        list(show(folder, "tail", "train", 1))
