"""One HTML file that tells what a run did, or several side by side: facts, curves, history, samples, configuration.

It stands alone (no script, no network, images inside), reads on a phone and in print, and follows the reader's choice
of light or dark. All text that comes from a run is escaped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from pretrain import plots
from pretrain.amounts import duration, short_number
from pretrain.ensemble.relevance import judged
from pretrain.metrics import redact
from pretrain.page import escaped, number, page, picture, section, table
from pretrain.plots import Incident, Line
from pretrain.run_folder import Record, RunFolder, counted, read_lines

FINAL_STEPS = 20
HISTORY_ROWS = 80
SAMPLE_CHARACTERS = 4000
ALARMS = {"fault", "save_failed", "invalid_checkpoint", "fallback", "skip", "warning"}
RECOVERIES = {"resume", "restart", "done"}


@dataclass(frozen=True)
class Run:
    """What the report needs of one run. rows: a line for every step, the last attempt's. lost: the lines of attempts
    that died, for steps that were done again, by attempt."""

    name: str
    rows: list[Record]
    lost: dict[int, list[Record]]
    evals: list[Record]
    history: list[Record]
    facts: Record
    config: str

    def line(self, key: str, label: str | None = None) -> Line:
        """The curve of one number over steps."""
        return Line(label or self.name, [row["step"] for row in self.rows], [row.get(key) for row in self.rows])


def write_report(folders: list[RunFolder], out: Path, samples: Sequence[Record] = ()) -> None:
    """Write the report of one run, or of several side by side, to `out`.

    samples: generated texts beyond the runs' own `sample` events, each {"prompt", "text"} and perhaps "step", "run".
    """
    runs = [read_run(folder) for folder in folders]
    several = len(runs) > 1
    parts = [_heading(runs), _comparison(runs) if several else _facts(runs[0])]
    parts += [_loss(runs), _dynamics(runs), _sources(runs), _heldout(runs), _modules(runs), _experts(runs)]
    parts += [*(_history(run, several) for run in runs), _samples(runs, samples)]
    parts += [_configuration(run, several) for run in runs]
    title = escaped(" · ".join(run.name for run in runs))
    write_whole(out, page(title, parts).encode())


def read_run(folder: RunFolder) -> Run:
    """Everything that a run folder tells."""
    lines = list(read_lines(folder.metrics))
    # steps beyond the newest line belong to a dead attempt and are still to be done again
    newest = lines[-1]["step"] if lines else 0
    rows = {line["step"]: line for line in lines if line["step"] <= newest}
    lost: dict[int, list[Record]] = {}
    for line in lines:
        if line is not rows.get(line["step"]):
            lost.setdefault(line["attempt"], []).append(line)
    evals = {record["step"]: record for record in read_lines(folder.evals)}
    config = folder.config.read_text() if folder.config.exists() else ""
    return Run(
        folder.name, [row for _, row in sorted(rows.items())], lost, [record for _, record in sorted(evals.items())],
        folder.history(), folder.facts(), redact(config),
    )  # fmt: skip


def incidents(run: Run) -> list[Incident]:
    """Every stop of a run and where it went on from, in order."""
    found: list[Incident] = []
    before = ""
    for event in run.history:
        kind, step = event["event"], event.get("step")
        if kind == "fault":
            if step is None:
                earlier = [row["step"] for row in _all_rows(run) if row["time"] <= event["time"]]
                step = earlier[-1] if earlier else None
            rank = event.get("rank")
            found.append(Incident(step, None, "fault" if rank is None else f"rank {rank} failed"))
        elif kind in ("restart", "resume") and step is not None:
            # the supervisor expects a step, the new attempt finds it, or an older one if that is damaged
            if before in ("fault", "restart"):
                found[-1] = replace(found[-1], resumed=step)
            elif step > 0:
                found.append(Incident(None, step, f"resumed at {step:,}"))
        before = kind if kind in ("fault", "restart", "resume") else before
    return found


def _all_rows(run: Run) -> list[Record]:
    return sorted([*run.rows, *(row for rows in run.lost.values() for row in rows)], key=lambda row: row["time"])


def _summary(run: Run) -> dict[str, tuple[str, float | None]]:
    """The headline facts by name: as text, and as a number where less or more of it is better."""
    facts: dict[str, tuple[str, float | None]] = {}
    parameters = run.facts.get("parameters") or next((e["parameters"] for e in run.history if "parameters" in e), None)
    if parameters:
        facts["parameters"] = (short_number(parameters), None)
    if run.rows:
        last, tail = run.rows[-1], [row["loss"] for row in run.rows[-FINAL_STEPS:] if math.isfinite(row["loss"])]
        facts["tokens"], facts["steps"] = (short_number(last["tokens"]), None), (f"{last['step']:,}", None)
        if tail:
            facts["final loss"] = (f"{statistics.mean(tail):.4f}", -statistics.mean(tail))
    if run.evals:
        newest = run.evals[-1]
        facts["held-out loss"] = (f"{newest['loss']:.4f}", -newest["loss"])
        if newest.get("bits_per_byte") is not None:
            facts["held-out bits per byte"] = (f"{newest['bits_per_byte']:.4f}", -newest["bits_per_byte"])
    times = [record["time"] for record in (*run.history, *run.rows)]
    if times:
        facts["wall time"] = (duration(max(times) - min(times)), None)
    if run.rows:
        rate = statistics.median(row["tokens_per_s"] for row in run.rows)
        facts["tokens per second"] = (short_number(rate), rate)
    facts["restarts"] = (str(sum(1 for incident in incidents(run) if incident.resumed is not None)), None)
    return facts


_HEADED: dict[str, Callable[[Any], str]] = {
    "world": lambda world: counted(world, "rank"),
    "host": lambda host: f"on {host}",
}


def _heading(runs: list[Run]) -> str:
    history, name = runs[0].history, " · ".join(run.name for run in runs)
    told = [time.strftime("%Y-%m-%d %H:%M", time.localtime(history[0]["time"]))] if history else ["has not begun"]
    for key, say in _HEADED.items() if len(runs) == 1 else ():
        told += [say(event[key]) for event in history if event["event"] == "start" and key in event][:1]
    return f"<h1>{escaped(name)}</h1><p class=sub>{escaped(', '.join(told))}</p>"


def _facts(run: Run) -> str:
    cards = "".join(f"<div class=fact><b>{escaped(v)}</b><span>{k}</span></div>" for k, (v, _) in _summary(run).items())
    empty = "" if run.rows else "<p class=note>No step has been completed yet.</p>"
    return f"<div class=facts>{cards}</div>{empty}"


def _comparison(runs: list[Run]) -> str:
    """A row for every run; the best of a column stands out."""
    summaries = [_summary(run) for run in runs]
    names = list(dict.fromkeys(name for summary in summaries for name in summary))
    best = {}
    for name in names:
        scores = [s[name][1] for s in summaries if name in s]
        best[name] = max((score for score in scores if score is not None), default=None)
    lines = []
    for run, summary in zip(runs, summaries):
        cells = []
        for name in names:
            text, score = summary.get(name, ("", None))
            mark = " best" if score is not None and score == best[name] else ""
            cells.append(f'<td class="n{mark}">{escaped(text)}</td>')
        lines.append(f"<tr><td>{escaped(run.name)}</td>{''.join(cells)}</tr>")
    return section("Comparison", table(["run"], names, lines))


def _loss(runs: list[Run]) -> str:
    drawn = [run for run in runs if run.rows]
    if not drawn:
        return ""
    lines = [run.line("loss", "training" if len(drawn) == 1 else None) for run in drawn]
    heldout = [_line_of_evals(run) for run in drawn if run.evals]
    redone, stops = [], []
    for run in drawn:
        for rows in run.lost.values():
            redone.append(Line(run.name, [row["step"] for row in rows], [row["loss"] for row in rows]))
        stops += [replace(i, label=f"{run.name}: {i.label}") if len(drawn) > 1 else i for i in incidents(run)]
    wide, narrow = (plots.loss(lines, redone, heldout, stops, narrow=n) for n in (False, True))
    caption = "Training loss of every step and its running mean." + (" Dots: held-out text." if heldout else "")
    caption += " Red: where the run was struck down; green: the checkpoint it went on from." if stops else ""
    return section("Loss", picture(wide, caption, narrow))


def _line_of_evals(run: Run) -> Line:
    return Line(run.name, [record["step"] for record in run.evals], [record["loss"] for record in run.evals])


def _dynamics(runs: list[Run]) -> str:
    drawn = [run for run in runs if run.rows]
    if not drawn:
        return ""
    mfus = [run.line("mfu") for run in drawn if any(row.get("mfu") is not None for row in run.rows)]
    rates = [run.line("tokens_per_s") for run in drawn]
    left = plots.gradient_and_lr([run.line("grad_norm") for run in drawn], [run.line("lr") for run in drawn])
    figures = picture(left, "Gradient norm before clipping; learning rate.")
    figures += picture(
        plots.throughput(rates, mfus), "Tokens per second over recent steps" + (", and MFU." if mfus else ".")
    )
    return section("Training", f"<div class=pair>{figures}</div>")


def _sources(runs: list[Run]) -> str:
    """Training loss per source, one figure a run that has several."""
    figures = []
    for run in runs:
        names = list(dict.fromkeys(name for row in run.rows for name in row["source_loss"]))
        if len(names) < 2:
            continue
        lines = []
        for name in names:
            had = [row for row in run.rows if name in row["source_loss"]]
            lines.append(Line(name, [row["step"] for row in had], [row["source_loss"][name] for row in had]))
        narrow = plots.by_source(lines)
        wide = narrow if len(runs) > 1 else plots.by_source(lines, wide=True)
        figures.append(picture(wide, run.name if len(runs) > 1 else "", narrow))
    layout = "pair" if len(figures) > 1 else ""
    return section("Loss by source", f"<div class='{layout}'>{''.join(figures)}</div>") if figures else ""


def _heldout(runs: list[Run]) -> str:
    """The newest evaluation of every run: by source as table and bars, and by position."""
    newest = {run.name: run.evals[-1] for run in runs if run.evals}
    if not newest:
        return ""
    names = list(dict.fromkeys(name for record in newest.values() for name in record["sources"]))
    rows = []
    for run, record in newest.items():
        whole = {key: record.get(key) for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
        for name, figures in (*record["sources"].items(), *([("all", whole)] if len(record["sources"]) != 1 else [])):
            cells = "".join(f"<td class=n>{number(figures.get(key))}</td>" for key in whole)
            first = f"<td>{escaped(run)}</td>" if len(newest) > 1 else ""
            rows.append(f"<tr>{first}<td>{escaped(name)}</td>{cells}</tr>")
    heads = (["run"] if len(newest) > 1 else []) + ["source"]
    shown = table(heads, ["loss", "perplexity", "bits per byte", "tokens"], rows)
    bits = {r: [record["sources"].get(n, {}).get("bits_per_byte") for n in names] for r, record in newest.items()}
    figures = picture(plots.heldout_bars(names, bits), "Bits per byte by source.") if names else ""
    lines = []
    for run, record in newest.items():
        places = [entry for entry in record.get("by_position") or [] if entry[2] is not None]
        middles = [math.sqrt((first + 1) * (last + 1)) for first, last, _, _ in places]
        lines += [Line(run, middles, [entry[2] for entry in places])] if places else []
    if lines:
        figures += picture(
            plots.by_position(lines), "Loss by position: how much the model gains from what it has read."
        )
    steps = ", ".join(sorted({f"{record['step']:,}" for record in newest.values()}))
    note = f"<p class=note>Text that is never trained on, at step {steps}.</p>"
    return section("Held-out text", f"{note}{shown}<div class=pair style='margin-top:22px'>{figures}</div>")


def _modules(runs: list[Run]) -> str:
    """Of every ensemble how relevant each module is to each source, now and over training."""
    figures = []
    for run in runs:
        told = [(record["step"], of_sources) for record in run.evals if (of_sources := judged(record))]
        if not told:
            continue
        name, (step, newest) = f"{run.name}, " if len(runs) > 1 else "", told[-1]
        caption = "what share each module has in predicting held-out text, and below it the module's own loss."
        figures.append(picture(plots.relevance(newest), f"{name}step {step:,}: {caption}"))
        if len(told) > 1:
            best = {source: max(of, key=lambda module: of[module].relevance) for source, of in newest.items()}
            lines = [
                Line(f"{module} on {source}", [s for s, _ in told], [of[source][module].relevance for _, of in told])
                for source, module in best.items()
            ]
            figures.append(picture(plots.relevance_over_training(lines), f"{name}relevance over training."))
    return section("Modules", f"<div class=pair>{''.join(figures)}</div>") if figures else ""


def _experts(runs: list[Run]) -> str:
    """Of every run with mixtures of experts the most and the least that an expert of any layer had to do."""
    figures = []
    for run in runs:
        extremes: dict[str, list[float]] = {"most": [], "least": []}
        steps = []
        for row in run.rows:
            layers: dict[str, list[float]] = {}
            for name, share in row.get("model", {}).items():
                layer, found, _ = name.rpartition("/load.")
                if found:
                    layers.setdefault(layer, []).append(share)
            if layers:
                shares = [share * len(layer) for layer in layers.values() for share in layer]
                steps.append(row["step"])
                extremes["most"].append(max(shares))
                extremes["least"].append(min(shares))
        if steps:
            lines = [Line(f"{which} loaded", steps, list(values)) for which, values in extremes.items()]
            named = f"{run.name}: " if len(runs) > 1 else ""
            figures.append(picture(plots.loads(lines), f"{named}the most and the least loaded expert of any layer."))
    return section("Experts", f"<div class=pair>{''.join(figures)}</div>") if figures else ""


def _history(run: Run, several: bool) -> str:
    """What happened and when; checkpoints in one line when there are many."""
    events = [event for event in run.history if event["event"] != "sample"]
    saved = [event for event in events if event["event"] == "checkpoint"]
    if len(events) > HISTORY_ROWS // 2:
        events = [event for event in events if event["event"] != "checkpoint"]
    note = f"<p class=note>{len(saved):,} checkpoints are not listed.</p>" if saved and saved[0] not in events else ""
    if len(events) > HISTORY_ROWS:
        note += f"<p class=note>The first and the last of {len(events):,} events.</p>"
        events = [*events[: HISTORY_ROWS // 2], *events[-HISTORY_ROWS // 2 :]]
    rows = []
    for event in events:
        kind = event["event"]
        tone = "bad" if kind in ALARMS else "good" if kind in RECOVERIES else ""
        since = duration(event["time"] - run.history[0]["time"])
        rows.append(
            f'<tr><td class=t>+{since}</td><td class="n attempt">{escaped(event.get("attempt", ""))}</td>'
            f'<td class="kind {tone}">{escaped(kind)}</td><td class=m>{escaped(event.get("message", ""))}</td></tr>'
        )
    if not rows:
        return ""
    head = '<tr><th>time</th><th class="n attempt">attempt</th><th>event</th><th>what happened</th></tr>'
    shown = f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    return section(f"History of {run.name}" if several else "History", note + shown)


def _samples(runs: list[Run], more: Sequence[Record]) -> str:
    """The newest texts that the models wrote."""
    cards = []
    for run in runs:
        own = [event for event in run.history if event["event"] == "sample"][-6:]
        cards += [_sample(event, run.name if len(runs) > 1 else "") for event in own]
    cards += [_sample(record, str(record.get("run", ""))) for record in more]
    return section("What it writes", "".join(cards)) if cards else ""


def _sample(record: Record, run: str) -> str:
    told = [run] if run else []
    told += [f"step {record['step']:,}"] if isinstance(record.get("step"), int) else []
    text, prompt = str(record.get("text", ""))[:SAMPLE_CHARACTERS], str(record.get("prompt", ""))
    # whether a text repeats its prompt is the writer's choice; it is shown once
    text = text.removeprefix(prompt)
    head = f"<p class=note style='font-family:inherit'>{escaped(', '.join(told))}</p>" if told else ""
    return f"<div class=sample>{head}<p><span class=prompt>{escaped(prompt)}</span>{escaped(text)}</p></div>"


def _configuration(run: Run, several: bool) -> str:
    if not run.config:
        return ""
    folded = f"<details><summary>config.yaml</summary><pre>{escaped(run.config)}</pre></details>"
    return section(f"Configuration of {run.name}" if several else "Configuration", folded)
