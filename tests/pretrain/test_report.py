"""The report: complete, self-contained, harmless, and there for runs of any length."""

from __future__ import annotations

import base64
import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pretrain import plots
from pretrain.amounts import duration
from pretrain.ensemble.relevance import judged
from pretrain.metrics import JsonlSink
from pretrain.plots import LIGHT, Line
from pretrain.report import incidents, read_run, write_report
from pretrain.run_folder import Record, RunFolder, append_line

VOID = {"meta", "img", "source"}
START = 1_800_000_000.0


class Page(HTMLParser):
    """What a browser would find: text, images, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def addresses(self) -> list[str]:
        return [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key in ("src", "srcset", "href")
        ]


def row(step: int, attempt: int = 0, **other: Any) -> Record:
    loss = 2 + 3 / step
    made = {
        "step": step, "attempt": attempt, "time": START + step + 10 * attempt, "loss": loss, "lr": 1e-3,
        "grad_norm": 1.0, "skipped": False, "tokens": 1000 * step, "tokens_per_s": 1000.0, "step_s": 1.0, "data_s": 0.0,
        "mfu": 0.4, "memory_mib": 100.0, "source_loss": {"books": loss, "code": loss - 0.5},
    }  # fmt: skip
    return made | other


def evaluation(step: int, bits: float | None = 1.1) -> Record:
    figures = {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": bits, "tokens": 5000}
    sources = {"books": figures, "code": figures}
    places = [[0, 0, 4.0, 10], [1, 2, 3.0, 20], [3, 6, None, 0]]
    return {"step": step, "attempt": 0, "time": START + step, "sources": sources, "by_position": places, **figures}


def event(folder: RunFolder, at: float, kind: str, message: str = "", attempt: int = 0, **facts: Any) -> None:
    append_line(folder.events, {"time": START + at, "attempt": attempt, "event": kind, "message": message, **facts})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "a-run")
    made.make()
    return made


@pytest.fixture
def crashed(folder: RunFolder) -> RunFolder:
    """100 steps; died at 70, went on from 60."""
    folder.set_facts(parameters=12_300_000)
    folder.config.write_text("data:\n  dir: https://user:canary@host/x?sig=canary\n")
    event(folder, 0, "start", "begins", step=0, world=2, host="node-1")
    sink = JsonlSink(folder.metrics)
    for step in range(1, 71):
        sink.write(row(step))
    event(folder, 70.5, "fault", "rank 1 was killed", rank=1, host="node-1")
    event(folder, 71, "restart", "restart", step=60)
    event(folder, 72, "resume", "goes on", attempt=1, step=60)
    for step in range(61, 101):
        sink.write(row(step, 1))
    sink.close()
    append_line(folder.evals, evaluation(50))
    append_line(folder.evals, evaluation(100))
    event(
        folder,
        120,
        "sample",
        prompt="Once <upon>",
        text="Once <upon> a <script>alert(1)</script>\x1b[31m time",
        step=100,
    )
    event(folder, 121, "done", "done", attempt=1)
    return folder


def written(*folders: RunFolder, **more: Any) -> Page:
    out = folders[0].path / "report.html"
    write_report(list(folders), out, **more)
    return Page(out.read_text())


def test_the_page_tells_the_headline_facts_and_the_history(crashed: RunFolder) -> None:
    text = written(crashed).text
    final = sum(2 + 3 / step for step in range(81, 101)) / 20
    said_by_page = ("a-run", "12.3M", "100k", f"{final:.4f}", "1.1000", "rank 1 was killed", "2 ranks", "+1 min 10 s")
    for said in said_by_page:
        assert said in text, said
    assert re.search(r"1restarts", text)


def test_the_page_needs_no_network_and_no_script(crashed: RunFolder) -> None:
    page = written(crashed)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    images = page.addresses()
    assert len(images) >= 12  # six figures, light and dark
    for image in images:
        assert image.startswith("data:image/svg+xml;base64,")
        ElementTree.fromstring(base64.b64decode(image.partition(",")[2]))


def test_text_from_a_run_is_escaped_and_secrets_are_left_out(crashed: RunFolder) -> None:
    more = [{"prompt": "<i>", "text": "\u202e&amp;", "run": "<b>"}]
    page = written(crashed, samples=more)
    assert "Once <upon> a <script>alert(1)</script>\ufffd[31m time" in page.text
    assert "<i>\ufffd&amp;" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("i", "upon", "script")]
    assert "canary" not in page.text
    assert "https://host/x" in page.text


def test_a_stop_is_one_incident_and_lost_steps_are_kept_apart(crashed: RunFolder) -> None:
    run = read_run(crashed)
    (incident,) = incidents(run)
    assert (incident.died, incident.resumed, incident.label) == (70, 60, "rank 1 failed")
    assert [row["step"] for row in run.rows] == list(range(1, 101))
    assert {row["attempt"] for row in run.rows if row["step"] > 60} == {1}
    assert [row["step"] for row in run.lost[0]] == list(range(61, 71))


def test_steps_that_a_resumed_run_has_not_done_again_yet_do_not_count_as_done(folder: RunFolder) -> None:
    for made in (*map(row, range(1, 38)), row(31, 1), row(32, 1)):
        append_line(folder.metrics, made)
    run = read_run(folder)
    assert run.rows[-1]["step"] == 32
    assert [row["step"] for row in run.lost[0]] == [*range(31, 38)]


def test_a_resume_from_an_older_checkpoint_than_expected_belongs_to_the_same_stop(folder: RunFolder) -> None:
    event(folder, 1, "fault", rank=0, step=45)
    event(folder, 2, "restart", step=40)
    event(folder, 3, "invalid_checkpoint", step=40, attempt=1)
    event(folder, 3, "resume", step=20, attempt=1)
    (incident,) = incidents(read_run(folder))
    assert (incident.died, incident.resumed) == (45, 20)


def test_a_resume_without_a_fault_is_told_too(folder: RunFolder) -> None:
    event(folder, 0, "resume", "no checkpoint yet: starting from step 0", step=0)
    event(folder, 0, "start", step=0)
    event(folder, 5, "signal", "SIGTERM")
    event(folder, 9, "resume", step=40, attempt=1)
    (incident,) = incidents(read_run(folder))
    assert (incident.died, incident.resumed) == (None, 40)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("evals", [0, 1])
def test_runs_that_have_hardly_begun_have_a_report(folder: RunFolder, steps: int, evals: int) -> None:
    for step in range(1, steps + 1):
        append_line(folder.metrics, row(step))
    for _ in range(evals):
        append_line(folder.evals, evaluation(1, bits=None))
    text = written(folder).text
    assert ("No step has been completed" in text) == (steps == 0)
    assert ("Held-out text" in text) == bool(evals)


def test_losses_that_are_not_finite_leave_gaps(folder: RunFolder) -> None:
    for step in range(1, 100):
        broken = {"loss": math.nan, "grad_norm": None, "skipped": True} if step > 50 else {}
        append_line(folder.metrics, row(step, **broken))
    assert "Loss" in written(folder).text


def test_several_runs_are_compared_and_the_best_stands_out(crashed: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "b-run")
    other.make()
    for step in range(1, 101):
        append_line(other.metrics, row(step, loss=1.5, tokens_per_s=10.0, mfu=None, source_loss={"books": 1.5}))
    page = written(crashed, other)
    best = [attrs for tag, attrs in page.tags if tag == "td" and "best" in (attrs.get("class") or "")]
    assert len(best) == 4  # loss of one; held-out loss, bits per byte and speed of the other
    assert "Comparison" in page.text and "History of a-run" in page.text
    figures = [base64.b64decode(image.partition(",")[2]) for image in page.addresses()]
    assert b"a-run" in figures[0] and b"b-run" in figures[0]


def test_a_long_history_is_cut_and_says_so(folder: RunFolder) -> None:
    for number in range(300):
        event(folder, number, "checkpoint", f"step {number} saved", step=number)
        event(folder, number, "skip", f"step {number} skipped", step=number)
    text = written(folder).text
    assert "300 checkpoints are not listed" in text
    assert "The first and the last of 300 events" in text
    assert text.count("skipped") == 80


def test_a_hundred_thousand_steps_make_a_small_page_soon(folder: RunFolder) -> None:
    lines = Line("x", range(1, 100_001), [2 + math.sin(step) + 5 / step for step in range(1, 100_001)])
    began = time.perf_counter()
    svg = plots.loss([lines], [], [], [])
    assert time.perf_counter() - began < 10
    assert len(svg) < 400_000


def test_a_dark_figure_has_no_colour_of_the_light_one() -> None:
    svg = plots.by_source([Line("a", [1, 2], [3.0, 2.0]), Line("b", [1, 2], [3.5, 2.5])])
    assert plots.SERIES_LIGHT[0] in svg
    night = plots.dark(svg)
    for light in (*plots.LIGHT.values(), *plots.SERIES_LIGHT):
        assert light not in night


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    program = "import sys, pretrain.report; print({'torch', 'matplotlib', 'wandb'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.5, "0.5 s"), (59, "59 s"), (61, "1 min 01 s"), (7500, "2 h 05 min"), (360000, "4 d 4 h")],
)
def test_durations_read_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def of_modules(step: int, share: float) -> Record:
    """An evaluation of an ensemble of two modules."""
    model = {
        source: {"relevance": {"books": share, "code": 1 - share}, "loss": {"books": 2.25, "code": 3.125}}
        for source in ("books", "code")
    }
    return evaluation(step) | {"model": model}


def test_an_ensembles_modules_are_shown_by_relevance_now_and_over_training(crashed: RunFolder) -> None:
    before = written(crashed)
    assert "Modules" not in before.text
    for step, share in ((60, 0.4), (110, 0.875)):
        append_line(crashed.evals, of_modules(step, share))
    page = written(crashed)
    images = [image for image in pictures(page) if image not in pictures(before)]
    (square, curve) = (image for image in images if "relevance" in image and LIGHT["ink"] in image)
    for shown in (">88%<", ">12%<", ">2.250<", ">3.125<", ">books<", ">code<"):
        assert shown in square
    assert ">books on code<" in curve
    assert "step 110: what share each module has" in page.text
    # figures without a module are no figures of the run, nor do other models have modules
    assert judged(of_modules(1, 0.5) | {"without": ["code"]})["books"] == {"books": (0.5, 2.25)}
    assert judged(evaluation(1) | {"model": {"blocks.0": {"load": 1.0}}}) == {}


def test_the_loads_of_experts_are_shown_over_training(folder: RunFolder) -> None:
    for step in range(1, 30):
        told = {"a.channel/load.0": 0.75, "a.channel/load.1": 0.25, "a.channel/entropy": 0.5, "other": 1.0}
        append_line(folder.metrics, row(step, model=told if step > 1 else {}))
    page = written(folder)
    assert "Experts" in page.text
    assert any(">most loaded<" in image and ">least loaded<" in image for image in pictures(page))


def pictures(page: Page) -> list[str]:
    """Every image as SVG."""
    return [base64.b64decode(address.split(",")[1]).decode() for address in page.addresses()]


def test_relevance_is_also_a_png(tmp_path: Path) -> None:
    image = plots.relevance_png(judged(of_modules(1, 0.5)))
    assert image.startswith(b"\x89PNG")
    assert image == plots.relevance_png(judged(of_modules(1, 0.5)))
