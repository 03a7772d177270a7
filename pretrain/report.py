"""One HTML file that tells what a run did, or several side by side: facts, curves, history, samples, configuration.

It stands alone (no script, no network, images inside), reads on a phone and in print, and follows the reader's choice
of light or dark. All text that comes from a run is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from pretrain import plots
from pretrain.metrics import redact
from pretrain.plots import Incident, Line, short_number
from pretrain.run_folder import Record, RunFolder, read_lines

FINAL_STEPS = 20
HISTORY_ROWS = 80
SAMPLE_CHARACTERS = 4000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ALARMS = {"fault", "save_failed", "invalid_checkpoint", "fallback", "skip", "warning"}
RECOVERIES = {"resume", "restart", "done"}

STYLE = """
:root { --page:#fff; --card:#f6f7f9; --ink:#1f2430; --quiet:#6b7385; --rule:#e3e6ec; --bad:#c92a37; --good:#148a4a;
  --accent:#2563eb; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --page:#14161a; --card:#1d2026; --ink:#e8eaf0; --quiet:#98a1b3;
  --rule:#31363f; --bad:#ff7b84; --good:#54d68c; --accent:#7aa7ff } }
@media print { :root { --page:#fff; --card:#f6f7f9; --ink:#1f2430; --quiet:#555c6b; --rule:#d5d9e0; --bad:#c92a37;
  --good:#148a4a } figure,.facts,.sample,tr { break-inside:avoid } h2 { break-after:avoid }
  .scroll { overflow:visible } .pair { grid-template-columns:1fr 1fr !important } }
* { box-sizing: border-box }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,
  sans-serif; -webkit-text-size-adjust:100% }
main { max-width:1100px; margin:0 auto; padding:32px 20px 64px }
h1 { font-size:1.8rem; line-height:1.2; margin:0 0 4px; overflow-wrap:anywhere }
h2 { font-size:1.15rem; margin:44px 0 10px; padding-top:14px; border-top:1px solid var(--rule) }
h3 { font-size:.95rem; margin:0 0 4px; font-weight:600 }
.sub, figcaption, .note { color:var(--quiet); font-size:.875rem; margin:0 0 8px }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(190px,44%),1fr)); gap:10px; margin:22px 0 }
.fact { background:var(--card); border-radius:10px; padding:12px 14px }
.fact b { display:block; font-size:1.3rem; font-weight:650; line-height:1.25; font-variant-numeric:tabular-nums }
.fact span { color:var(--quiet); font-size:.8rem }
figure { margin:0 0 18px } figure img { width:100%; height:auto; display:block }
figure .dark, figure .phone { display:none }
@media (max-width: 620px) { figure .light.phone { display:block } figure .light.desk { display:none } }
@media screen and (prefers-color-scheme: dark) { figure .light { display:none } figure .dark { display:block }
  figure .dark.phone { display:none } }
@media screen and (prefers-color-scheme: dark) and (max-width: 620px) { figure .dark.phone { display:block }
  figure .dark.desk, figure .light.phone { display:none } }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr)); gap:22px 34px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:.875rem; font-variant-numeric:tabular-nums }
th { text-align:left; color:var(--quiet); font-weight:500; white-space:nowrap }
td,th { padding:6px 12px 6px 0; border-bottom:1px solid var(--rule); vertical-align:top }
td.n,th.n { text-align:right; white-space:nowrap } td.t { color:var(--quiet); white-space:nowrap }
td.m { overflow-wrap:anywhere } .best { font-weight:700; color:var(--good) }
.kind { white-space:nowrap; font-weight:600 } .bad { color:var(--bad) } .good { color:var(--good) }
.sample { background:var(--card); border-radius:10px; padding:14px 16px; margin:0 0 14px }
.sample p { margin:0; white-space:pre-wrap; overflow-wrap:anywhere; font-family:ui-serif,Georgia,serif }
.sample .prompt { font-weight:700 }
pre { background:var(--card); border-radius:10px; padding:14px 16px; overflow-x:auto; font-size:.8rem }
summary { cursor:pointer; color:var(--accent) } footer { margin-top:48px; color:var(--quiet); font-size:.8rem }
@media (max-width: 620px) { .attempt { display:none } td,th { padding-right:9px } .kind { white-space:normal } }
"""


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
    parts += [_loss(runs), _dynamics(runs), _sources(runs), _heldout(runs)]
    parts += [*(_history(run, several) for run in runs), _samples(runs, samples)]
    parts += [_configuration(run, several) for run in runs]
    title = _text(" · ".join(run.name for run in runs))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{title}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + f"<footer>Written by Leviathan, {time.strftime('%Y-%m-%d %H:%M')}.</footer></main></body></html>\n"
    )
    write_whole(out, page.encode())


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


def _heading(runs: list[Run]) -> str:
    history, name = runs[0].history, " · ".join(run.name for run in runs)
    told = [time.strftime("%Y-%m-%d %H:%M", time.localtime(history[0]["time"]))] if history else ["has not begun"]
    for key, words in (("world", "{} ranks"), ("host", "on {}")) if len(runs) == 1 else ():
        told += [words.format(event[key]) for event in history if event["event"] == "start" and key in event][:1]
    return f"<h1>{_text(name)}</h1><p class=sub>{_text(', '.join(told))}</p>"


def _facts(run: Run) -> str:
    cards = "".join(f"<div class=fact><b>{_text(v)}</b><span>{k}</span></div>" for k, (v, _) in _summary(run).items())
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
            cells.append(f'<td class="n{mark}">{_text(text)}</td>')
        lines.append(f"<tr><td>{_text(run.name)}</td>{''.join(cells)}</tr>")
    return _section("Comparison", _table(["run"], names, lines))


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
    return _section("Loss", _picture(wide, caption, narrow))


def _line_of_evals(run: Run) -> Line:
    return Line(run.name, [record["step"] for record in run.evals], [record["loss"] for record in run.evals])


def _dynamics(runs: list[Run]) -> str:
    drawn = [run for run in runs if run.rows]
    if not drawn:
        return ""
    mfus = [run.line("mfu") for run in drawn if any(row.get("mfu") is not None for row in run.rows)]
    rates = [run.line("tokens_per_s") for run in drawn]
    left = plots.gradient_and_lr([run.line("grad_norm") for run in drawn], [run.line("lr") for run in drawn])
    figures = _picture(left, "Gradient norm before clipping; learning rate.")
    figures += _picture(
        plots.throughput(rates, mfus), "Tokens per second over recent steps" + (", and MFU." if mfus else ".")
    )
    return _section("Training", f"<div class=pair>{figures}</div>")


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
        figures.append(_picture(wide, run.name if len(runs) > 1 else "", narrow))
    layout = "pair" if len(figures) > 1 else ""
    return _section("Loss by source", f"<div class='{layout}'>{''.join(figures)}</div>") if figures else ""


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
            cells = "".join(f"<td class=n>{_number(figures.get(key))}</td>" for key in whole)
            first = f"<td>{_text(run)}</td>" if len(newest) > 1 else ""
            rows.append(f"<tr>{first}<td>{_text(name)}</td>{cells}</tr>")
    heads = (["run"] if len(newest) > 1 else []) + ["source"]
    table = _table(heads, ["loss", "perplexity", "bits per byte", "tokens"], rows)
    bits = {r: [record["sources"].get(n, {}).get("bits_per_byte") for n in names] for r, record in newest.items()}
    figures = _picture(plots.heldout_bars(names, bits), "Bits per byte by source.") if names else ""
    lines = []
    for run, record in newest.items():
        places = [entry for entry in record.get("by_position") or [] if entry[2] is not None]
        middles = [math.sqrt((first + 1) * (last + 1)) for first, last, _, _ in places]
        lines += [Line(run, middles, [entry[2] for entry in places])] if places else []
    if lines:
        figures += _picture(
            plots.by_position(lines), "Loss by position: how much the model gains from what it has read."
        )
    steps = ", ".join(sorted({f"{record['step']:,}" for record in newest.values()}))
    note = f"<p class=note>Text that is never trained on, at step {steps}.</p>"
    return _section("Held-out text", f"{note}{table}<div class=pair style='margin-top:22px'>{figures}</div>")


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
            f'<tr><td class=t>+{since}</td><td class="n attempt">{_text(event.get("attempt", ""))}</td>'
            f'<td class="kind {tone}">{_text(kind)}</td><td class=m>{_text(event.get("message", ""))}</td></tr>'
        )
    if not rows:
        return ""
    head = '<tr><th>time</th><th class="n attempt">attempt</th><th>event</th><th>what happened</th></tr>'
    table = f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    return _section(f"History of {run.name}" if several else "History", note + table)


def _samples(runs: list[Run], more: Sequence[Record]) -> str:
    """The newest texts that the models wrote."""
    cards = []
    for run in runs:
        own = [event for event in run.history if event["event"] == "sample"][-6:]
        cards += [_sample(event, run.name if len(runs) > 1 else "") for event in own]
    cards += [_sample(record, str(record.get("run", ""))) for record in more]
    return _section("What it writes", "".join(cards)) if cards else ""


def _sample(record: Record, run: str) -> str:
    told = [run] if run else []
    told += [f"step {record['step']:,}"] if isinstance(record.get("step"), int) else []
    text, prompt = str(record.get("text", ""))[:SAMPLE_CHARACTERS], str(record.get("prompt", ""))
    # whether a text repeats its prompt is the writer's choice; it is shown once
    text = text.removeprefix(prompt)
    head = f"<p class=note style='font-family:inherit'>{_text(', '.join(told))}</p>" if told else ""
    return f"<div class=sample>{head}<p><span class=prompt>{_text(prompt)}</span>{_text(text)}</p></div>"


def _configuration(run: Run, several: bool) -> str:
    if not run.config:
        return ""
    folded = f"<details><summary>config.yaml</summary><pre>{_text(run.config)}</pre></details>"
    return _section(f"Configuration of {run.name}" if several else "Configuration", folded)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _table(words: list[str], numbers: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{_text(w)}</th>" for w in words) + "".join(f"<th class=n>{_text(n)}</th>" for n in numbers)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _picture(svg: str, caption: str, narrow: str | None = None) -> str:
    """A figure with an image for light and one for dark pages, perhaps others for phones; `STYLE` shows one of them."""
    desk = "" if narrow is None else " desk"
    images = [(svg, "light" + desk), (plots.dark(svg), "dark" + desk)]
    images += [] if narrow is None else [(narrow, "light phone"), (plots.dark(narrow), "dark phone")]
    shown = "".join(f'<img class="{kind}" alt="{_text(caption)}" src="{_data_uri(image)}">' for image, kind in images)
    return f"<figure>{shown}" + (f"<figcaption>{_text(caption)}</figcaption></figure>" if caption else "</figure>")


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value < 1000 else f"{value:,.0f}"


def _text(value: Any) -> str:
    """Text from a run, harmless in a page: markup escaped, control characters and direction overrides shown as �."""
    return html.escape(CONTROL.sub("\ufffd", str(value)))


def duration(seconds: float) -> str:
    """`2 h 05 min` for 7,500 seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 72 else f"{hours // 24} d {hours % 24} h"
