"""`leviathan eval | generate | report`: what a trained model is worth, what it writes, what became of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

from configs.errors import ConfigError, DataError, UsageError
from data_pipeline.places import public
from launcher.screen import Bar, harmless, make_table, make_terminal
from pretrain.ensemble.relevance import judged
from pretrain.evaluate import HeldOut
from pretrain.generate import Sampling, generate
from pretrain.models.ensemble import LeviathanModelEnsemble
from pretrain.report import write_report
from pretrain.run_folder import Record, RunFolder, append_line
from pretrain.trained import Trained, evaluate_trained, load_trained

Device = Literal["auto", "cpu", "cuda"]


# ---- what it is worth


def evaluate_run(run: str, *, step: int | None, rows: int | None, device: Device, without: Sequence[str] = ()) -> None:
    """Print the held-out figures of a checkpoint; add them to the run's evals.jsonl.

    rows: of each source, or all. without: modules of an ensemble to leave out; such figures are kept in a file of their
    own, since they are not the run's.
    """
    folder, terminal = RunFolder.find(run), make_terminal()
    with terminal.status("loading the checkpoint"):
        trained = load_trained(folder, step, _device(device))
    if without:
        _leave_out(trained, without)
    batch_rows = trained.config.eval.batch_rows
    total = _heldout_rows(trained, rows)
    done = 0

    with Bar(terminal, "evaluating", show=_rows_shown) as bar:

        def advance() -> None:
            nonlocal done
            bar.update(done, total)
            done = min(total, done + batch_rows)

        record = evaluate_trained(trained, rows=rows, batch_rows=batch_rows, alive=advance)
        bar.update(total, total)
    place = folder.path / "evals_without.jsonl" if without else folder.evals
    record |= {"without": sorted(without)} if without else {}
    append_line(place, record)
    terminal.print()
    if without:
        told_of = f"without {', '.join(record['without'])}: the relevance of the other modules adds up to 1\n"
        terminal.print(told_of, style="yellow", soft_wrap=True)
    terminal.print(_by_source(record, f"{folder.name} at step {trained.step:,} on held-out text"))
    terminal.print()
    terminal.print(_by_position(record))
    show_modules(folder.name, record)
    terminal.print(f"\nadded to {place}", soft_wrap=True)


def show_modules(name: str, record: Record) -> None:
    """Print what each module of an ensemble is worth on each source, and how relevant it is; of other models nothing.

    record: of an evaluation. name: of the run.
    """
    of_sources = judged(record)
    if not of_sources:
        return
    modules = list(dict.fromkeys(module for of_modules in of_sources.values() for module in of_modules))
    table = make_table("source", ">ensemble", *(f">{module}" for module in modules))
    for source, of_modules in of_sources.items():
        best = max(of_modules, key=lambda module: of_modules[module].relevance)
        cells = [
            Text(f"{of_modules[m].loss:.4f} {of_modules[m].relevance:>4.0%}", style="bold" if m == best else "")
            for m in modules
        ]
        table.add_row(source, f"{record['sources'][source]['loss']:.4f}", *cells)
    terminal = make_terminal()
    title = f"\n{name} at step {record['step']:,}: loss by module, and how relevant it is"
    terminal.print(title, style="bold", soft_wrap=True)
    terminal.print(table)


def _leave_out(trained: Trained, without: Sequence[str]) -> None:
    if not isinstance(trained.model, LeviathanModelEnsemble):
        raise UsageError(f"--without {without[0]}: this run trained a single model, which has no modules to leave out")
    trained.model.without(without)


def _heldout_rows(trained: Trained, rows: int | None) -> int:
    config, dataset = trained.config, trained.dataset
    heldout = HeldOut(dataset.manifest, dataset.shards, list(config.data.sources), config.model.length, rows)
    if not heldout.rows:
        raise DataError(
            f"the shards in {public(config.data.dir)} hold no held-out text (data.heldout was {config.data.heldout});"
            " build them with data.heldout=0.01 in another data.dir"
        )
    return len(heldout.rows)


def _rows_shown(count: float) -> str:
    return f"{count:,.0f} rows" if count >= 10 or count == int(count) else f"{count:.1f} rows"


def _by_source(record: Record, title: str) -> Table:
    table = make_table("source", ">loss", ">perplexity", ">bits per byte", ">tokens", title=title)
    several = len(record["sources"]) > 1
    for name, figures in [*record["sources"].items(), *([("all", record)] if several else [])]:
        bits = "–" if figures["bits_per_byte"] is None else f"{figures['bits_per_byte']:.4f}"
        style = "bold" if name == "all" and figures is record else ""
        perplexity = f"{figures['perplexity']:,.2f}"
        table.add_row(name, f"{figures['loss']:.4f}", perplexity, bits, f"{figures['tokens']:,}", style=style)
    return table


def _by_position(record: Record) -> Table:
    """How much the model gains from what it has read: the loss by the number of tokens before."""
    table = make_table(">tokens before", ">loss", ">tokens", "", title="loss by context")
    entries = record["by_position"]
    highest = max(entry[2] for entry in entries)
    for first, last, loss, count in entries:
        span = f"{first:,}" if first == last else f"{first:,}–{last:,}"
        table.add_row(span, f"{loss:.4f}", f"{count:,}", Text("█" * round(30 * loss / highest), style="cyan"))
    return table


# ---- what it writes


def write_text(run: str, prompt: str, *, step: int | None, tokens: int, sampling: Sampling) -> None:
    """Print `prompt` and what the model goes on with, piece by piece as it comes. Nothing is recorded."""
    if tokens < 1:
        raise UsageError(f"--tokens {tokens} leaves nothing to write; give at least 1")
    trained = load_trained(RunFolder.find(run), step, _device("auto"))
    # a file gets what the model wrote; a terminal must not be steered by it
    shown = harmless if sys.stdout.isatty() else str
    for piece in _pieces(trained, prompt, tokens, sampling):
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def _pieces(trained: Trained, prompt: str, tokens: int, sampling: Sampling) -> Iterator[str]:
    yield prompt
    yield from generate(trained.model, trained.dataset.tokenizer, prompt, tokens=tokens, sampling=sampling)


# ---- what it did


def report_runs(runs: list[str], out: Path | None) -> None:
    """Write one HTML page of a run, or of several side by side."""
    folders = [RunFolder.find(run) for run in runs]
    if out is None:
        out = folders[0].path / "report.html" if len(folders) == 1 else Path("report.html")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out} is no file in a folder that is there; name one, for example report.html")
    write_report(folders, out)
    make_terminal().print(f"wrote {out}", soft_wrap=True)


def _device(wanted: Device) -> str:
    """The device to use. Raises ConfigError where a wanted GPU is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU here; use --device cpu, or check the driver")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"
