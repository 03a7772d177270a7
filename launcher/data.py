"""`leviathan data …`: build shards, check every byte of them, look at what they hold, ask what a step read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal

from configs.errors import DataError, UsageError
from data_pipeline.build import Progress, build
from data_pipeline.files import human_bytes
from data_pipeline.inspect_shards import check, load_manifest, show
from data_pipeline.manifest import Manifest, Split
from data_pipeline.on_ray import ray_executor
from data_pipeline.places import is_url, public
from launcher.prepare import resolve
from launcher.runs import newest_row
from launcher.screen import Bar, cores, harmless, make_table, make_terminal, one_line, told
from pretrain.explain import Row, explain
from pretrain.run_folder import RunFolder

SHOWN_PARTS = 3
_WHAT = {"scan": "scanning", "sample": "sampling", "train tokenizer": "training the tokenizer", "encode": "encoding"}


def build_shards(
    files: Sequence[str], words: Sequence[str], workers: int | None, rebuild: bool, on_ray: str | None = None
) -> None:
    """Build data.dir of a configuration, with a bar for each phase and a table at the end.

    on_ray: address of the cluster that works, instead of processes here; its nodes see all paths as this machine does.
    """
    config, _ = resolve(files, words)
    out: Path | str = config.data.dir
    if not is_url(config.data.dir):
        # the nodes of a cluster need not be where this process is
        out = Path(config.data.dir).expanduser() if on_ray is None else Path(config.data.dir).expanduser().resolve()
    shown = public(str(out))
    terminal = make_terminal()
    phases = _Phases(terminal)
    try:
        with contextlib.nullcontext() if on_ray is None else ray_executor(on_ray) as cluster:
            # one task at work on each core and one that waits: nothing idles, and nothing piles up
            many = workers or (cores() if cluster is None else 2 * cluster.cores)
            who = f"{many} workers" if cluster is None else f"{cluster.cores} cores of {cluster.nodes} nodes (Ray)"
            terminal.print(f"building {shown} from {', '.join(config.data.sources) or 'no sources'} with {who}")
            manifest = build(config.data, out, workers=many, executor=cluster, progress=phases.tell, rebuild=rebuild)
    except KeyboardInterrupt:
        phases.close(finished=False)
        terminal.print("interrupted; what is finished is kept, and the same command goes on from there")
        raise
    except BaseException:
        phases.close(finished=False)
        raise
    phases.close()
    if not phases.any:
        terminal.print("these shards were built before, and all of them are there")
    terminal.print()
    terminal.print(_sources(manifest))
    tokenizer = manifest.tokenizer
    terminal.print(f"\ntokenizer {tokenizer.spec}, {tokenizer.vocab:,} ids; fingerprint {manifest.fingerprint[:12]}…")
    again = " ".join([*files, *words])
    look = f"leviathan data show {out} | " if isinstance(out, Path) else ""
    terminal.print(f"Next: {look}leviathan check {again} | leviathan train {again}", soft_wrap=True)


def check_shards(place: str, length: int | None) -> None:
    """Read every byte that a folder of shards names. Raises DataError with a line for each thing that is wrong."""
    folder, terminal = _local(place, "data check"), make_terminal()
    with Bar(terminal, "checking") as bar:
        problems = check(folder, bar.update)
    if problems:
        raise DataError("\n".join(problems))
    manifest = load_manifest(folder)
    tokens = int(manifest.column("tokens").sum())
    terminal.print(
        f"{folder}: all {manifest.table.num_rows:,} shards, the tokenizer and the manifest are sound"
        f" ({tokens:,} tokens in {int(manifest.column('documents').sum()):,} documents)"
    )
    if length is not None:
        terminal.print()
        terminal.print(_waste(manifest, length))


def show_samples(place: str, source: str | None, split: Split, count: int) -> None:
    """Print documents as they are decoded from the shards, spread evenly over each source."""
    folder, terminal = _local(place, "data show"), make_terminal()
    names = [source] if source is not None else list(load_manifest(folder).sources)
    for name in names:
        shown = 0
        for document in show(folder, name, split, count):
            shown += 1
            title = f"── {name} · {harmless(document.name)} · {document.tokens:,} tokens "
            terminal.print(told(title.ljust(min(terminal.width, 100), "─"), "bold"), no_wrap=True, overflow="ellipsis")
            terminal.print(told(document.text), soft_wrap=True)
            terminal.print()
        if not shown:
            terminal.print(f"source {name} has no document in split {split}")


def explain_step(run: str, step: int) -> None:
    """Print which documents the rows of a step came from."""
    folder = RunFolder.find(run)
    found = explain(folder, step)
    row = newest_row(folder)
    done = row["step"] if row is not None else 0
    terminal = make_terminal()
    tense = "read" if step <= done else f"has not been taken yet (the run is at {done:,}); it will read"
    last = found.first_row + found.count - 1
    terminal.print(
        f"step {step:,} of {folder.name} {tense} rows {found.first_row:,} to {last:,}, each {found.length:,} tokens and"
        " the one that follows them",
        soft_wrap=True,
    )
    if row is not None and (line := _outcome(folder, step)):
        terminal.print(line, soft_wrap=True)
    table = make_table(">row", "source", "shard", ">tokens from", "documents (tokens read of each)", "begins with")
    for read in found.rows:
        table.add_row(
            f"{read.number:,}", read.source, read.shard, f"{read.first:,}", _documents(read), one_line(read.text, 200)
        )
    terminal.print()
    terminal.print(table)


def _outcome(folder: RunFolder, step: int) -> str:
    """What became of a step, as a line; empty where metrics.jsonl has none of it."""
    row = folder.steps().get(step)
    if row is None:
        return ""
    outcome = "its update was skipped" if row["skipped"] else f"its loss was {row['loss']:.4f}"
    sources = ", ".join(f"{name} {loss:.4f}" for name, loss in row["source_loss"].items())
    return f"{outcome} ({sources})" if len(row["source_loss"]) > 1 else outcome


class _Phases:
    """A bar for the phase that is under way."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._phase = terminal, ""
        self._bar: Bar | None = Bar(terminal, "planning")
        self.any = False
        """Whether there was anything to do."""

    def tell(self, progress: Progress) -> None:
        """Show it; a new phase closes the bar of the one before."""
        if progress.phase != self._phase:
            self.close()
            self._phase, self.any = progress.phase, True
            self._bar = Bar(self._terminal, _WHAT[progress.phase])
        if self._bar is not None:
            self._bar.update(progress.done_bytes, progress.total_bytes, progress.kept_bytes)

    def close(self, finished: bool = True) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close(finished)
            self._bar = None


def _sources(manifest: Manifest) -> Any:
    """What was made of each source."""
    table = make_table(
        "source", ">documents", ">text", ">tokens", ">held out", ">duplicates", ">empty", ">Unicode errors",
        ">bytes/token", ">shards",
    )  # fmt: skip
    names = manifest.table["source"].to_pylist()
    for name, facts in manifest.sources.items():
        tokens = facts["train_tokens"] + facts["heldout_tokens"]
        table.add_row(
            name, f"{facts['documents']:,}", human_bytes(facts["text_bytes"]), f"{facts['train_tokens']:,}",
            f"{facts['heldout_tokens']:,}", f"{facts['duplicates']:,}", f"{facts['empty']:,}",
            f"{facts['unicode_errors']:,}", f"{facts['text_bytes'] / max(1, tokens):.2f}", str(names.count(name)),
        )  # fmt: skip
    return table


def _waste(manifest: Manifest, length: int) -> Any:
    """What rows of `length` tokens leave unread in the tails of shards."""
    table = make_table(
        "source", ">rows an epoch", ">tokens", ">in no row", ">share", title=f"rows of {length:,} tokens"
    )
    for name in manifest.sources:
        tokens = manifest.column("tokens")[manifest.rows_of(name, "train")]
        rows = (tokens - 1) // length
        # a row reads its tokens and the one after; a shard without a row leaves all of its tokens
        unread = int((tokens - (rows * length + (rows > 0))).sum())
        total = int(tokens.sum())
        table.add_row(name, f"{int(rows.sum()):,}", f"{total:,}", f"{unread:,}", f"{unread / max(1, total):.2%}")
    return table


def _documents(row: Row) -> str:
    parts = [f"{one_line(part.name, 60)} ({part.tokens:,})" for part in row.parts]
    more = len(parts) - SHOWN_PARTS
    return "\n".join([*parts[:SHOWN_PARTS], *([f"and {more} more"] if more > 0 else [])])


def _local(place: str, verb: str) -> Path:
    if is_url(place):
        raise UsageError(f"{public(place)} is far away; copy it here first, for `leviathan {verb}` reads much of it")
    return Path(place).expanduser()
