"""Text into shards: the same bytes whoever builds them, and however often they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset

from configs.errors import LeviathanError
from data_pipeline import build as builder
from data_pipeline import corpora, tasks
from data_pipeline.build import Progress, build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.inspect_shards import check
from data_pipeline.tokenizer import load_folder
from tests.data_pipeline.building import Config, Hashes, children, decoded, jsonl


def test_every_document_is_in_one_split_with_its_end(tmp_path: Path, tale: Path, config: Config) -> None:
    source = SourceConfig(path=str(tale), separator="<|>")
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
    assert counts["split"] == "hash" and counts["path"] == str(tale)
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
    assert killed and not children()
    assert not (tmp_path / "out" / "manifest.json").exists()
    again: list[Progress] = []
    build(data, tmp_path / "out", workers=1, progress=again.append)
    assert again[-1].kept_bytes > 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.timeout(100)
def test_an_interrupt_leaves_no_process_and_no_draft(tmp_path: Path, data: DataConfig) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(data, tmp_path / "out", workers=2, progress=interrupt)
    assert not children()
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.timeout(100)
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path, tale: Path) -> None:
    script = f"""
import os, sys
from pathlib import Path
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
if __name__ == "__main__":
    data = DataConfig(sources={{"s": SourceConfig(path={str(tale)!r})}}, shard_mib=0.04)
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
