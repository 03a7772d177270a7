"""Build shards: plan, scan for duplicates, make the tokenizer, encode, and at last write the manifest.

    build(data, out, workers=8) -> Manifest

The same text and configuration give the same bytes, whatever the number of workers and however often the build was
killed and begun again. Until the manifest is there nothing in the folder says that it is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configs.errors import ConfigError, DataError, LeviathanError
from data_pipeline import corpora, plan, tokenizer
from data_pipeline import manifest as manifests
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.documents import Slice
from data_pipeline.duplicates import repeated
from data_pipeline.files import free_bytes, human_bytes
from data_pipeline.manifest import HEADER, TABLE, Manifest, ShardInfo, TokenizerInfo
from data_pipeline.output import LocalFolder, Output, load_tokenizer, output_of, save_tokenizer
from data_pipeline.places import RECORDS, public
from data_pipeline.pool import executor_of, run_all
from data_pipeline.splits import Counts, Rules, hash_number, usable
from data_pipeline.tasks import Encode, Encoded, Sample, Scan, Scanned, Train, disk_may_be_full
from data_pipeline.tokenizer import Tokenizer

FEW = 100
"""Sources with fewer documents than this hold out the tail of each, instead of whole documents."""

SAMPLED_SLICES = 32
READERS = 16
MIB = 1 << 20

Phase = Literal["scan", "sample", "train tokenizer", "encode"]


@dataclass(frozen=True)
class Progress:
    """How far a phase is, told after every slice. Bytes are of expected text, over all sources.

    source: whose slice was just finished. kept_bytes: the part of done_bytes that an earlier build had done, which
    says nothing of the speed of this one. documents, tokens, shards: so far in this phase.
    """

    phase: Phase
    source: str
    done_bytes: int
    total_bytes: int
    kept_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    shards: int = 0


Report = Callable[[Progress], None]


def build(
    data: DataConfig,
    out: Path | str,
    *,
    workers: int,
    executor: Executor | None = None,
    progress: Report = lambda progress: None,
    rebuild: bool = False,
) -> Manifest:
    """Make the shards of `data` in the folder `out`, going on where an earlier build of the same text stopped.

    out: a path, or the URL of a folder on s3:// or gs://. workers: tasks at a time, in as many processes (1: in this
    one), or wherever `executor` sends them; its workers must see the text, and `out` where it is a path, under the
    same paths. rebuild: replace what another build has written into `out`.
    Raises ConfigError for a wrong configuration or a folder that holds other shards, DataError for text that cannot be
    read, LeviathanError when a worker died or the disk is full.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name a source, for example data.sources.code.path=stdlib")
    if workers < 1:
        raise ConfigError(f"a build with {workers} workers does nothing; give at least 1")
    tokenizer.check_spec(data.tokenizer)
    output = output_of(out)
    shard_bytes = int(data.shard_mib * MIB)
    # a byte is two bytes of shard; what is held back leaves room for the ends of documents, so one slice is one shard
    slice_bytes = max(1, int(shard_bytes / 2 * 0.95))
    plans = {name: corpora.plan(name, source, slice_bytes) for name, source in data.sources.items()}
    identity = plan.identity(data, plans)
    with output.alone(), disk_may_be_full(output.disk, "the plan, the tokenizer or the manifest"):
        folder = plan.Folder(output)
        if rebuild:
            folder.clear()
        finished = folder.claim(identity)
        if finished is not None:
            return finished
        try:
            with executor_of(workers) if executor is None else nullcontext(executor) as pool:
                # a task that waits behind each one at work, so that no process of ours ever does
                in_flight = 2 * workers if executor is None and workers > 1 else workers
                made = _Build(data, output, plans, pool, in_flight, progress).run()
        finally:
            output.sweep()
        # far away nothing keeps others out, and who was told to rebuild may have taken the folder meanwhile
        folder.check(identity)
        header, table = manifests.encode(made)
        output.write(TABLE, table)
        output.write(HEADER, header)
        return made


@dataclass
class _Source:
    """What is known of one source so far. scans and dropped: one for each slice, where it was scanned."""

    name: str
    config: SourceConfig
    plan: corpora.Plan
    rules: Rules
    slices: list[Slice]
    scans: dict[int, Scanned] = field(default_factory=dict)
    dropped: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def limit_bytes(self) -> int | None:
        """The text that may be taken of it."""
        return None if self.config.limit_mib is None else max(1, int(self.config.limit_mib * MIB))

    def reached(self) -> bool:
        """Whether the slices scanned so far, without a gap, hold all that may be taken."""
        return self.limit_bytes is not None and self._up_to_limit() is not None

    def cut_at_limit(self) -> None:
        """Leave only the slices that may be taken, the last of them cut where the limit is."""
        last = self._up_to_limit()
        if last is None:
            return
        number, left = last
        whole = self.scans[number].counts.read_bytes == left
        self.slices = [*self.slices[:number], replace(self.slices[number], limit_bytes=None if whole else left)]
        self.scans = {n: scan for n, scan in self.scans.items() if n < number or (n == number and whole)}

    def _up_to_limit(self) -> tuple[int, int] | None:
        """The slice in which the limit lies and what may be taken of it; None while it lies beyond what was scanned."""
        left = self.limit_bytes
        for number in range(len(self.slices)):
            if left is None or number not in self.scans:
                return None
            size = self.scans[number].counts.read_bytes
            if size >= left:
                return number, left
            left -= size
        return None


class _Build:
    """One build: its phases in order, each leaving plain values for the next."""

    def __init__(
        self,
        data: DataConfig,
        output: Output,
        plans: dict[str, corpora.Plan],
        pool: Executor,
        in_flight: int,
        progress: Report,
    ) -> None:
        self._data, self._output, self._pool, self._in_flight, self._progress = data, output, pool, in_flight, progress
        rules = Rules(data.unicode_errors, data.heldout, int(data.heldout * 2**64))
        self._sources = [_Source(name, data.sources[name], one, rules, list(one.slices)) for name, one in plans.items()]

    def run(self) -> Manifest:
        """All phases; the manifest of what they made, which nobody has written yet."""
        self._scan()
        for source in self._sources:
            self._decide(source)
        made = self._tokenizer()
        self._check_disk(made)
        return self._finish(made, self._encode(made))

    def _scan(self) -> None:
        """Hash the documents of sources in which duplicates are dropped, and measure those that have a limit."""
        scanned = [s for s in self._sources if self._data.duplicates == "drop" or s.limit_bytes is not None]
        self._take_scans(scanned)
        cut = [source for source in scanned if source.limit_bytes is not None]
        for source in cut:
            source.cut_at_limit()
        self._take_scans(cut)

    def _take_scans(self, sources: list[_Source]) -> None:
        by_name = {source.name: source for source in sources}
        missing = [s for source in sources for s in source.slices if s.number not in source.scans]

        def tasks() -> Iterator[Scan]:
            for part in missing:
                source = by_name[part.source]
                if part.limit_bytes is not None or not source.reached():
                    yield Scan(part, source.rules, self._output)

        for task, result in self._run(tasks(), "scan", sum(part.text_bytes for part in missing)):
            by_name[task.slice.source].scans[task.slice.number] = result

    def _decide(self, source: _Source) -> None:
        """Which documents are duplicates, and what is held out."""
        if not source.scans:
            documents, lowest = _first_documents(source)
        else:
            scans = [source.scans[part.number] for part in source.slices]
            with ThreadPoolExecutor(READERS) as readers:  # of a store each is a journey
                hashes = list(readers.map(self._hashes, scans))
            if self._data.duplicates == "drop":
                source.dropped = dict(enumerate(repeated(hashes)))
            kept = np.concatenate([np.delete(h[:, 0], source.dropped.get(n, [])) for n, h in enumerate(hashes)])
            if not len(kept):
                raise _empty(source, _total(scan.counts for scan in scans), 0)
            documents, lowest = len(kept), int(kept.min())
        if documents < FEW:
            source.rules = replace(source.rules, tail=source.rules.heldout > 0)
        elif source.rules.heldout > 0:
            # at 1 %, every third source of 100 documents would hold out none
            source.rules = replace(source.rules, heldout_below=max(source.rules.heldout_below, lowest + 1))

    def _hashes(self, scan: Scanned) -> np.ndarray:
        """What a scan wrote, (documents, 2) u64."""
        content = self._output.read(f"{RECORDS}/{scan.hashes}")
        if content is None:
            raise DataError(f"{scan.hashes} is gone from {self._output.where}/{RECORDS}; build again")
        return np.frombuffer(content, dtype="<u8").reshape(-1, 2)

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder: saved by an earlier build, or made now."""
        spec = self._data.tokenizer
        if not tokenizer.is_trained(spec):
            made = tokenizer.make(spec, [])
            save_tokenizer(self._output, made)
            return made
        try:
            return load_tokenizer(self._output)
        except DataError:
            pass  # none yet, or a torn one: made again, it is the same
        texts = self._sample()
        size = sum(map(len, texts))
        self._progress(Progress("train tokenizer", "", 0, size))
        training = iter([Train(spec, texts, self._output)])
        made = next(outcome.get() for _, outcome in run_all(training, self._pool, 1))
        self._progress(Progress("train tokenizer", "", size, size))
        return made

    def _sample(self) -> list[str]:
        """Texts to train a tokenizer on: of every source its share, from slices spread over it."""
        budget = self._data.tokenizer_sample_mib * MIB
        total = sum(part.text_bytes for source in self._sources for part in source.slices)
        tasks = []
        for source in self._sources:
            share = sum(part.text_bytes for part in source.slices) / max(1, total)
            count = min(len(source.slices), SAMPLED_SLICES)
            for number in range(count):
                part = source.slices[number * len(source.slices) // count]
                tasks.append(Sample(part, source.rules, int(budget * share / count) + 1, self._output))
        found = {
            task.name: result
            for task, result in self._run(iter(tasks), "sample", sum(task.slice.text_bytes for task in tasks))
        }
        return [text for task in tasks for text in found[task.name]]

    def _encode(self, made: Tokenizer) -> dict[str, list[Encoded]]:
        """Every slice as shards."""
        shard_bytes = int(self._data.shard_mib * MIB)
        none = np.empty(0, dtype=np.int64)
        tasks = (
            Encode(
                part,
                source.rules,
                self._output,
                made.sha256,
                shard_bytes,
                source.dropped.get(part.number, none),
                source.scans[part.number].sha256 if source.scans else None,
            )
            for source in self._sources
            for part in source.slices
        )
        total = sum(part.text_bytes for source in self._sources for part in source.slices)
        found = {(task.slice.source, task.slice.number): result for task, result in self._run(tasks, "encode", total)}
        return {s.name: [found[s.name, part.number] for part in s.slices] for s in self._sources}

    def _run(self, tasks: Iterator[Scan | Sample | Encode], phase: Phase, total: int) -> Iterator[tuple[Any, Any]]:
        """Each task and its result. Raises what went wrong in the first that failed."""
        told = Progress(phase, "", 0, total)
        for task, outcome in run_all(tasks, self._pool, self._in_flight):
            result, size = outcome.get(), task.slice.text_bytes
            yield task, result
            shards = result.shards if isinstance(result, Encoded) else ()
            told = replace(
                told,
                source=task.slice.source,
                done_bytes=told.done_bytes + size,
                kept_bytes=told.kept_bytes + (size if outcome.kept else 0),
                documents=told.documents + (0 if isinstance(task, Sample) else result.counts.documents),
                tokens=told.tokens + sum(shard.tokens for shard in shards),
                shards=told.shards + len(shards),
            )
            self._progress(told)

    def _check_disk(self, made: Tokenizer) -> None:
        """Stop before the work when it cannot fit. A token is taken to stand for as much text as it ever does."""
        if not isinstance(self._output, LocalFolder):
            return  # a store has no end that it would tell
        text = sum(part.text_bytes for source in self._sources for part in source.slices)
        bytes_a_token = 1 if made.spec == "bytes" else 8
        needed = text * (2 if made.vocab <= 1 << 16 else 4) // bytes_a_token // 2
        there = sum(size for name, size in self._output.sizes().items() if name.endswith(".tar"))
        free = free_bytes(self._output.disk)
        if needed - there > free:
            raise LeviathanError(
                f"the shards need at least {human_bytes(needed)} in {self._output.where}, where {human_bytes(free)} are"
                " free; make room, choose another data.dir, or set limit_mib of the sources"
            )

    def _finish(self, made: Tokenizer, encoded: dict[str, list[Encoded]]) -> Manifest:
        """The manifest of everything that was made."""
        shards, statistics = [], {}
        for source in self._sources:
            found = [shard for result in encoded[source.name] for shard in result.shards]
            # the sort is stable: within a split they stay in the order of the text
            shards += sorted(found, key=lambda shard: shard.split != "train")
            statistics[source.name] = _statistics(source, encoded[source.name], found)
        return manifests.make(TokenizerInfo(made.spec, made.sha256, made.vocab), shards, statistics)


def _first_documents(source: _Source) -> tuple[int, int]:
    """How many documents a source has and the lowest of their hashes, reading no further than `_decide` needs."""
    documents, lowest = 0, 2**64
    for part in source.slices:
        for found in usable(part, source.rules, Counts()):
            documents += 1
            lowest = min(lowest, hash_number(found.digest))
            if documents >= FEW and (lowest < source.rules.heldout_below or not source.rules.heldout):
                return documents, lowest
    return documents, lowest


def _statistics(source: _Source, results: Iterable[Encoded], shards: list[ShardInfo]) -> dict[str, Any]:
    """What the manifest says of a source. Raises DataError when there is nothing to train on."""
    counts = _total(result.counts for result in results)
    tokens: Counter[str] = Counter()
    for shard in shards:
        tokens[shard.split] += shard.tokens
    if tokens["train"] < 2:
        raise _empty(source, counts, tokens["train"])
    return {
        "path": public(source.config.path),
        "split": "tail" if source.rules.tail else "hash",
        "documents": counts["documents"],
        "empty": counts["empty"],
        "duplicates": counts["duplicates"],
        "unicode_errors": counts["unicode_errors"],
        "skipped_files": source.plan.skipped_files,
        "text_bytes": counts["text_bytes"],
        "train_tokens": tokens["train"],
        "heldout_tokens": tokens["heldout"],
    }


def _total(counts: Iterable[Counts]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(vars(one))
    return total


def _empty(source: _Source, counts: Counter[str], tokens: int) -> DataError:
    return DataError(
        f"source {source.name!r} is empty: {public(source.config.path)} gave {counts['documents']:,} documents and"
        f" {tokens} tokens to train on ({counts['empty']:,} documents hold only whitespace,"
        f" {counts['unicode_errors']:,} are not UTF-8); check its path and field"
    )
