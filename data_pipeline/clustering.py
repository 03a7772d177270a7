"""Text without labels, cut into kinds: embed every document, group them, write each group as a source of its own.

    cluster(data, out, into=4) -> Clustered

The text is read three times (to learn the embedding, to embed, to write), once more where a tokenizer is trained. In
memory are counts of buckets, a sample of them, and of each document its embedding of 32 numbers. The same text,
configuration and seed give the same clusters; every document that is not empty is in exactly one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import yaml

from configs.errors import ConfigError, DataError, LeviathanError, UsageError
from data_pipeline import clusters as files
from data_pipeline import corpora, tokenizer
from data_pipeline.clusters import BUCKETS, WIDTH, Clusters, Facts
from data_pipeline.config import DataConfig
from data_pipeline.documents import MAX_DOCUMENT, cut_text
from data_pipeline.embedding import Learner, embed
from data_pipeline.files import free_bytes, fsync_folder, human_bytes, write_whole
from data_pipeline.kmeans import Grouped, balanced_kmeans
from data_pipeline.scratch import scratch
from data_pipeline.splits import Counts, Rules, Usable, usable
from data_pipeline.tasks import disk_may_be_full
from data_pipeline.tokenizer import Tokenizer

CLUSTERS, FACTS, CONFIG, SHARDS = "clusters.safetensors", "clusters.json", "clusters.yaml", "shards"
DOCUMENTS = "documents.jsonl"
EXCERPT = 200
_DIGITS = 4  # of a source's weight: they become whole numbers, which must not grow large
_SLICE = 64 << 20
_SAMPLED = 32  # no document is more than so much of the text that a tokenizer is trained on

Progress = Callable[[str, float, float], None]
"""Told what is being done, how far, and of how much: bytes of text, or steps while it is `learning` or `grouping`."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster is. text_bytes, tokens: of its documents. distance: mean square, of a token's document to the
    centre. shares: part of its tokens that is of each source. central: the beginning of its most central document."""

    name: str
    documents: int
    text_bytes: int
    tokens: int
    distance: float
    shares: dict[str, float]
    central: str = ""


@dataclass(frozen=True)
class Clustered:
    """What was made in a folder, and what was met while reading."""

    clusters: list[Cluster]
    documents: int
    empty: int
    unicode_errors: int
    config: Path


@dataclass
class _Read:
    """What is kept of every document, in the order of the text."""

    source: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)


def cluster(
    data: DataConfig, out: Path, *, into: int, source: str | None = None, ids: int | None = None, seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Clustered:  # fmt: skip
    """Group the documents of one source, or of all, into `into` clusters of equal shares of tokens, in a new folder.

    ids: token ids in an n-gram; left out, 3 of bytes and 2 of a trained tokenizer's. `out` appears whole.
    Raises UsageError for what cannot be asked, ConfigError for a wrong configuration, DataError for text that cannot be
    read or grouped, LeviathanError where the disk is full.
    """
    if into < 2:
        raise UsageError(f"--into {into} makes no clusters; write 2 or more")
    if out.exists():
        raise UsageError(f"{out} is already there; remove it, or give another --out")
    if not data.sources:
        raise ConfigError("data.sources is empty; name a source, for example data.sources.code.path=stdlib")
    if source is not None and source not in data.sources:
        raise UsageError(f"there is no source {source!r}; data.sources has {', '.join(data.sources)}")
    tokenizer.check_spec(data.tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch(out.parent) as drafts, disk_may_be_full(out.parent, "clusters"):
        draft = drafts / "whole"
        draft.mkdir()
        work = _Work(data, [source] if source is not None else list(data.sources), draft, out.resolve(), progress)
        made = work.run(into, ids, seed)
        if out.exists():
            raise UsageError(f"{out} was made by somebody else meanwhile; give another --out")
        fsync_folder(draft)
        draft.rename(out)
        fsync_folder(out.parent)
    return made


class _Work:
    """One clustering: its passes in order."""

    def __init__(self, data: DataConfig, sources: list[str], draft: Path, out: Path, progress: Progress) -> None:
        self._data, self._sources, self._draft, self._out, self._progress = data, sources, draft, out, progress
        self._plans = [corpora.plan(name, data.sources[name], _SLICE) for name in sources]
        self._rules = Rules(data.unicode_errors, 0.0, 0)
        limits = [data.sources[name].limit_mib for name in sources]
        self._limits = [None if mib is None else max(1, int(mib * 2**20)) for mib in limits]
        self._expected = sum(
            min(plan.text_bytes, limit or plan.text_bytes) for plan, limit in zip(self._plans, self._limits)
        )
        self._counts = Counts()

    def run(self, into: int, ids: int | None, seed: int) -> Clustered:
        """All passes."""
        made = self._tokenizer()
        names = tuple(f"{_prefix(self._data)}{number}" for number in range(into))
        grams = ids or (3 if made.spec == "bytes" else 2)
        facts = Facts(made.sha256, made.vocab, grams, BUCKETS, WIDTH, names)
        learner = Learner(facts)
        for _, found in self._documents("reading"):
            learner.add(made.encode(found.document.text))
            self._counts.documents += 1
        if self._counts.documents < into:
            raise DataError(
                f"there are {self._counts.documents:,} documents for {into} clusters; make fewer clusters, or cut the"
                " text into more documents (the source's `separator`)"
            )
        table_HE = learner.table(seed, partial(self._progress, "learning"))
        read = self._embed(made, table_HE, facts)
        tokens_N = np.array(read.tokens, dtype=np.float64)
        starts = partial(self._progress, "grouping")
        grouped = balanced_kmeans(np.stack(read.embeddings), tokens_N, into, seed, starts)
        documents_K = np.bincount(grouped.cluster_N, minlength=into)
        if not documents_K.all():
            raise DataError(
                f"{into} clusters of equal shares leave one empty, for single documents are longer than a share; make"
                " fewer clusters, or cut the text into more documents (the source's `separator`)"
            )
        self._check_disk(read)
        central = self._write(read, grouped, names)
        told = [replace(c, central=text) for c, text in zip(self._describe(read, grouped, names), central)]
        files.save(self._draft / CLUSTERS, Clusters(facts, table_HE, grouped.centres_KE.astype(np.float32)))
        report = {**asdict(facts), "seed": seed, "clusters": [asdict(one) for one in told]}
        write_whole(self._draft / FACTS, json.dumps(report, indent=1, ensure_ascii=False).encode())
        write_whole(self._draft / CONFIG, self._config(made, facts, read, grouped).encode())
        counts = self._counts
        return Clustered(told, counts.documents, counts.empty, counts.unicode_errors, self._out / CONFIG)

    # ---- reading

    def _documents(self, what: str, counts: Counts | None = None) -> Iterator[tuple[int, Usable]]:
        """Every usable document, with the number of its source. counts: what is met is counted there."""
        done, counts = 0, self._counts if what == "reading" else Counts()
        for number, (plan, limit) in enumerate(zip(self._plans, self._limits)):
            left = limit
            for part in plan.slices:
                before = counts.read_bytes
                for found in usable(part if left is None else replace(part, limit_bytes=left), self._rules, counts):
                    yield number, found
                    done += found.text_bytes
                    self._progress(what, min(done, self._expected), self._expected)
                if left is not None:
                    left -= counts.read_bytes - before
                    if left <= 0:
                        break

    def _tokenizer(self) -> Tokenizer:
        """The configuration's tokenizer, trained on a sample where it is to be; kept in the folder."""
        spec = self._data.tokenizer
        made = tokenizer.make(spec, self._sample() if tokenizer.is_trained(spec) else [])
        if made.spec != "bytes":
            made.save(self._draft)
        return made

    def _sample(self) -> list[str]:
        """Beginnings of documents, spread over all text."""
        budget, texts, seen, taken = int(self._data.tokenizer_sample_mib * 2**20), list[str](), 0, 0
        for _, found in self._documents("sampling"):
            if taken >= budget:
                break
            if taken * self._expected <= seen * budget:
                texts.append(cut_text(found.document.text, min(budget - taken, budget // _SAMPLED + 1)))
                taken += len(texts[-1].encode())
            seen += found.text_bytes
        return texts

    def _embed(self, made: Tokenizer, table_HE: np.ndarray, facts: Facts) -> _Read:
        read = _Read()
        for number, found in self._documents("embedding"):
            ids_N = made.encode(found.document.text)
            read.source.append(number)
            # a foreign sentencepiece model may remove all of a text
            read.tokens.append(max(1, len(ids_N)))
            read.text_bytes.append(found.text_bytes)
            read.embeddings.append(embed(ids_N, table_HE, facts))
        self._check_same(len(read.tokens))
        return read

    def _check_same(self, documents: int) -> None:
        if documents != self._counts.documents:
            raise DataError(
                f"the text changed while it was read: {documents:,} documents, {self._counts.documents:,} before;"
                " cluster it again when its files are finished"
            )

    # ---- writing

    def _check_disk(self, read: _Read) -> None:
        needed, free = sum(read.text_bytes), free_bytes(self._draft)
        if needed > free:
            raise LeviathanError(
                f"the clusters need at least {human_bytes(needed)} in {self._out.parent}, where {human_bytes(free)} are"
                " free; make room, choose another --out, or set limit_mib of the sources"
            )

    def _write(self, read: _Read, grouped: Grouped, names: tuple[str, ...]) -> list[str]:
        """Every document into the folder of its cluster; how the most central one of each begins."""
        central = {}
        for k in range(len(names)):
            own = np.flatnonzero(grouped.cluster_N == k)
            central[int(own[grouped.distance_N[own].argmin()])] = k
        excerpts, count = [""] * len(names), 0
        folders = [_Folder(self._draft / name) for name in names]
        try:
            for place, (number, found) in enumerate(self._documents("writing")):
                if place >= len(read.tokens) or read.text_bytes[place] != found.text_bytes:
                    self._check_same(-1)
                folders[grouped.cluster_N[place]].add(self._sources[number], found)
                count += 1
                if place in central:
                    excerpts[central[place]] = found.document.text[:EXCERPT]
        finally:
            for folder in folders:
                folder.close()
        self._check_same(count)
        return excerpts

    def _describe(self, read: _Read, grouped: Grouped, names: tuple[str, ...]) -> list[Cluster]:
        tokens_N, source_N = np.array(read.tokens), np.array(read.source)
        bytes_N, out = np.array(read.text_bytes), []
        for k, name in enumerate(names):
            own = grouped.cluster_N == k
            tokens = int(tokens_N[own].sum())
            of_each = np.bincount(source_N[own], weights=tokens_N[own], minlength=len(self._sources)) / tokens
            shares = {name: round(float(share), 4) for name, share in zip(self._sources, of_each) if share}
            distance = float(np.average(grouped.distance_N[own], weights=tokens_N[own]))
            out.append(Cluster(name, int(own.sum()), int(bytes_N[own].sum()), tokens, distance, shares))
        return out

    def _config(self, made: Tokenizer, facts: Facts, read: _Read, grouped: Grouped) -> str:
        """What is laid over the configuration: clusters as sources and as modules, instead of what they were made of.

        A cluster's weight is what its text weighed before, so that the mixture of all text stays what it was.
        """
        size = (len(self._sources), len(facts.names))
        tokens_SK = np.zeros(size)
        np.add.at(tokens_SK, (np.array(read.source), grouped.cluster_N), np.array(read.tokens))
        weight_S1 = np.array([[self._data.sources[name].weight] for name in self._sources])
        total_S1 = np.maximum(tokens_SK.sum(1, keepdims=True), 1)
        weight_K = (weight_S1 * tokens_SK / total_S1).sum(0)
        sources: dict[str, object] = dict.fromkeys(self._sources)
        for name, weight in zip(facts.names, weight_K):
            least = 10**-_DIGITS
            sources[name] = {"path": str(self._out / name), "weight": max(least, round(float(weight), _DIGITS))}
        data: dict[str, object] = {"dir": str(self._out / SHARDS), "sources": sources}
        if made.spec != "bytes":
            data["tokenizer"] = str(self._out / tokenizer.MODEL)
        clusters = {
            "file": str(self._out / CLUSTERS), "ids": facts.ids, "buckets": facts.buckets, "width": facts.width,
        }  # fmt: skip
        ensemble = {"modules": list(facts.names), "fusion": "clusters", "clusters": clusters}
        head = (
            f"# {len(facts.names)} clusters of {', '.join(self._sources)}, to be given after the configuration they"
            f" were made with:\n#   leviathan ensemble CONFIG {CONFIG}\n"
        )
        tree = {"data": data, "model": {"ensemble": ensemble}}
        return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


class _Folder:
    """Where the documents of a cluster are written, in a form that sources are read in."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self._path, self._long = path, 0
        self._file: BinaryIO = open(path / DOCUMENTS, "wb")  # noqa: SIM115 (closed by `close`)

    def add(self, source: str, found: Usable) -> None:
        """Write a document, as a line, or as a file where it is too long for one."""
        record = {"text": found.document.text, "source": source, "name": found.document.name}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if len(line) <= MAX_DOCUMENT:
            self._file.write(line)
            return
        self._long += 1
        write_whole(self._path / f"long-{self._long:05d}.txt", found.document.text.encode())

    def close(self) -> None:
        """Finish the file; what was written is safe when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        fsync_folder(self._path)


def _prefix(data: DataConfig) -> str:
    """Of the clusters' names, so that none is a source's: their keys would be merged."""
    prefix = "c"
    while any(name.startswith(prefix) and name[len(prefix) :].isdigit() for name in data.sources):
        prefix += "c"
    return prefix
