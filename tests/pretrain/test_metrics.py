"""Lines of metrics, and the mirror on W&B with the real wandb: offline, unreachable, resumed, out of disk."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import DataError
from pretrain.leveldb_log import log_records
from pretrain.metrics import (
    WINDOW_STEPS,
    JsonlSink,
    Meter,
    read_offline_steps,
    redact,
    resident_mib,
    without_secrets,
)
from pretrain.run_folder import RunFolder, read_lines

ROOT = Path(__file__).parents[2]
KEY = "canary" + "x" * 34

SESSION = """
import json, os, signal, sys, time
from pathlib import Path
from pretrain import metrics
from pretrain.leveldb_log import log_records
from pretrain.metrics import JsonlSink, WandbMirror, read_offline_steps
from pretrain.run_folder import RunFolder

asked = json.loads(sys.argv[1])
folder = RunFolder(Path(asked["folder"]))
metrics.QUEUE_ITEMS = asked.get("queue_items", metrics.QUEUE_ITEMS)
mirror = WandbMirror(folder, asked["mode"], "project", None, {"data": {"dir": "https://u:canarypw@host/x?sig=canary"}})
began = time.perf_counter()
mirror.start()
started_s = time.perf_counter() - began
sink, writes_s = JsonlSink(folder.metrics), []
for step in range(asked["first"], asked["last"] + 1):
    row = {"step": step, "attempt": asked["attempt"], "time": time.time(), "loss": 5 / step + 1e-17 * step, "lr": 1e-3,
           "grad_norm": None if step == 5 else 1.0, "skipped": step == 5, "tokens_per_s": 1.0,
           "source_loss": {"books": 5 / step}, "memory_mib": 1.0 * asked["attempt"]}
    sink.write(row)
    before = time.perf_counter()
    mirror.write(row)
    writes_s.append(time.perf_counter() - before)
    if step % 10 == 0:
        mirror.write_eval({"step": step, "loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.1, "tokens": 9,
                           "sources": {"books": {"loss": 2.0}}, "by_position": [[0, 7, 2.5, 9]],
                           "model": {"module": {"books": {"loss": 1.5}}}})
    time.sleep(asked["step_s"])
    if step == asked.get("wait_at"):
        # not before the mirror has imported wandb: two threads cannot import it at once
        while not list(folder.wandb.glob("offline-run-*")) or step - 1 not in read_offline_steps(folder.path):
            time.sleep(0.1)
loop_s = time.perf_counter() - began - started_s
if asked.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
before = time.perf_counter()
mirror.close(asked["timeout_s"])
print(json.dumps({"start_s": started_s, "loop_s": loop_s, "slowest_write_s": max(writes_s),
                  "close_s": time.perf_counter() - before}))
"""


def begin(folder: RunFolder, first: int, last: int, **more: Any) -> subprocess.Popen[str]:
    """A process that logs steps first..last as a trainer does."""
    address = more.pop("address", "http://127.0.0.1:9")
    asked = {"folder": str(folder.path), "mode": "offline", "first": first, "last": last, "attempt": 0}
    asked |= {"step_s": 0.005, "timeout_s": 30.0, **more}
    environment = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SESSION, json.dumps(asked)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], *, killed: bool = False) -> dict[str, float]:
    """Wait; the session's figures. Nothing else may have been printed."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if killed else 0), err
    assert not err
    return {} if killed else json.loads(out)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "a-run")
    made.make()
    return made


def losses(last: int) -> dict[int, float]:
    return {step: 5 / step + 1e-17 * step for step in range(1, last + 1)}


def result(loss: float = 3.25, grad_norm: float | None = 1.5, by_source: tuple = (3.0, None)) -> Any:
    return SimpleNamespace(
        loss=loss, grad_norm=grad_norm, skipped=grad_norm is None, tokens=64, source_loss=list(by_source), votes=[],
        measures=[6.0, 2.0],
    )  # fmt: skip


def test_a_row_holds_what_the_models_measures_say_but_not_of_a_skipped_step() -> None:
    meter = Meter(0, ["books"], 1000, 6e6, figures=lambda measures: {"share": measures[0] / sum(measures)})
    assert meter.row(1, result(), 1e-3, 0.1, 0.0)["model"] == {"share": 0.75}
    assert meter.row(2, result(grad_norm=None), 1e-3, 0.1, 0.0)["model"] == {}


def test_a_row_holds_every_field_and_its_floats_survive_the_file_exactly(tmp_path: Path) -> None:
    meter = Meter(2, ["books", "code"], 1000, 6e6, peak_flops_per_s=1e12)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    rows = [meter.row(step, result(math.pi / step), 1e-3 / 3, 0.1, 0.01) for step in (1, 2)]
    for row in rows:
        sink.write(row)
    sink.close()
    assert list(read_lines(tmp_path / "metrics.jsonl")) == rows
    row = rows[1]
    assert (row["step"], row["attempt"], row["tokens"], row["skipped"]) == (2, 2, 2000, False)
    assert row["tokens_per_s"] == pytest.approx(10_000)
    assert row["mfu"] == pytest.approx(10_000 * 6e6 / 1e12)
    assert row["source_loss"] == {"books": 3.0}
    assert abs(row["memory_mib"] - resident_mib()) < 50


def test_a_skipped_step_has_no_gradient_norm_and_without_a_peak_there_is_no_mfu() -> None:
    row = Meter(0, ["books"], 10, 1.0).row(1, result(math.nan, None), 1e-3, 1.0, 0.0)
    assert (row["grad_norm"], row["skipped"], row["mfu"]) == (None, True, None)


def test_tokens_per_second_slide_over_recent_steps_only() -> None:
    meter = Meter(0, [], 100, 1.0, memory_mib=lambda: 7.0)
    meter.row(1, result(by_source=()), 0.0, 1000.0, 0.0)
    for step in range(2, WINDOW_STEPS + 2):
        row = meter.row(step, result(by_source=()), 0.0, 0.5, 0.0)
    assert row["tokens_per_s"] == pytest.approx(200)
    assert row["memory_mib"] == 7.0


def test_a_row_and_its_line_cost_little(tmp_path: Path) -> None:
    meter, sink = Meter(0, ["a", "b"], 10, 1.0, peak_flops_per_s=1.0), JsonlSink(tmp_path / "m.jsonl")
    times = []
    for step in range(2000):
        began = time.perf_counter()
        sink.write(meter.row(step, result(), 1e-3, 0.1, 0.0))
        times.append(time.perf_counter() - began)
    # the bound is 30 µs each; a shared machine is given room
    assert sorted(times)[len(times) // 2] < 120e-6


def test_a_line_torn_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    sink = JsonlSink(path)
    sink.write({"step": 2})
    sink.close()
    assert [row["step"] for row in read_lines(path)] == [1, 2]


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, write, full = JsonlSink(tmp_path / "m.jsonl"), os.write, [True]

    def refuse(handle: int, data: bytes) -> int:
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(handle, data[:7])

    monkeypatch.setattr(os, "write", refuse)
    sink.write({"step": 1})
    sink.write({"step": 2})
    full[0] = False
    sink.write({"step": 3})
    sink.close()
    assert [row["step"] for row in read_lines(tmp_path / "m.jsonl")] == [1, 2, 3]


def test_secrets_are_left_out_of_what_is_shown() -> None:
    shown = without_secrets(
        {"a": ["s3://key:pw@bucket/x?X-Sig=1#f"], "hf_token": "hf_1", "tokens": 5, "b": {"api_key": 1}}
    )
    assert shown == {"a": ["s3://bucket/x"], "hf_token": "(hidden)", "tokens": 5, "b": {"api_key": "(hidden)"}}
    assert redact("GET 'https://u:p@h/p?q=1' failed?") == "GET 'https://h/p' failed?"


@pytest.mark.parametrize("flushed", [False, True], ids=["the log lost rows", "the log has rows to be done again"])
def test_after_a_kill_every_step_is_drawn_once_and_none_is_lost(folder: RunFolder, flushed: bool) -> None:
    finish(begin(folder, 1, 30, wait_at=30 if flushed else 10, kill=True), killed=True)
    before = read_offline_steps(folder.path)
    assert max(before) == 29 if flushed else max(before) < 29
    # as after a checkpoint at step 20
    finish(begin(folder, 21, 40, attempt=1))
    assert read_offline_steps(folder.path) == losses(40)
    assert len({log.name for log in folder.wandb.glob("*run-*/run-*.wandb")}) == 1
    assert f"run-{folder.facts()['wandb_id']}.wandb" in {log.name for log in folder.wandb.glob("*/run-*.wandb")}
    leaked = [path for path in folder.path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert not leaked


def test_a_torn_or_damaged_log_is_read_up_to_the_damage_and_a_step_that_stands_twice_is_an_error(
    folder: RunFolder,
) -> None:
    finish(begin(folder, 1, 200, step_s=0.0))
    log = next(folder.wandb.glob("offline-run-*/run-*.wandb"))
    whole = log.read_bytes()
    assert len(whole) > 2 * 32768  # records cross the borders of blocks
    assert read_offline_steps(folder.path) == losses(200)
    for damaged in (whole[: len(whole) // 2], whole[:40000] + b"\0" * (len(whole) - 40000), whole[:3]):
        log.write_bytes(damaged)
        steps = read_offline_steps(folder.path)
        assert list(steps) == list(range(1, len(steps) + 1)) and len(steps) < 200
    assert sum(1 for _ in log_records(whole)) > 200
    log.write_bytes(whole)
    shutil.copytree(log.parent, log.parent.with_name("offline-run-copy"))
    with pytest.raises(DataError, match="stands twice"):
        read_offline_steps(folder.path)


def test_rows_that_found_no_room_in_the_queue_are_sent_all_the_same(folder: RunFolder) -> None:
    finish(begin(folder, 1, 300, step_s=0.001, queue_items=3))
    assert read_offline_steps(folder.path) == losses(300)


@pytest.mark.parametrize(
    ("hangs", "timeout_s"),
    [
        pytest.param(False, 1.0, id="refuses"),
        pytest.param(True, 0.0, id="accepts and never answers"),
        pytest.param(False, 40.0, id="refuses until wandb itself gives up", marks=pytest.mark.e2e),
    ],
)
def test_an_unreachable_server_delays_nothing_and_the_rows_are_logged_offline(
    folder: RunFolder, hangs: bool, timeout_s: float
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hangs:
            server.listen(50)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        told = finish(begin(folder, 1, 100, mode="online", address=address, timeout_s=timeout_s))
    assert told["start_s"] < 1
    assert told["loop_s"] < 12  # to wait for W&B would take 15
    assert told["close_s"] < 25
    assert read_offline_steps(folder.path) == losses(100)
    (warning,) = (event for event in folder.history() if event["event"] == "warning")
    assert re.match(
        r"wandb unreachable \(\d+ s\): logging offline to .*offline-run.*; later: wandb sync", warning["message"]
    )


def test_a_place_that_takes_nothing_never_stops_the_run(folder: RunFolder) -> None:
    folder.wandb.write_text("a file where the folder should be")
    finish(begin(folder, 1, 20))
    (warning,) = folder.history()
    assert "wandb stopped" in warning["message"]
    assert len(folder.steps()) == 20


def test_a_disk_that_fills_up_never_stops_the_run(folder: RunFolder) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder.path], capture_output=True
    ).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        folder.make()
        told = finish(begin(folder, 1, 2000, step_s=0.0))
        assert told["close_s"] < 30
        shutil.rmtree(folder.wandb)
    finally:
        subprocess.run(["umount", folder.path], check=True)


def test_without_wandb_there_is_one_sentence_and_the_run_goes_on(folder: RunFolder) -> None:
    program = "import sys; sys.modules['wandb'] = None\n" + SESSION
    asked = {"folder": str(folder.path), "mode": "offline", "first": 1, "last": 5, "attempt": 0, "step_s": 0.0}
    command = [sys.executable, "-c", program, json.dumps({**asked, "timeout_s": 5.0})]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=30)
    (warning,) = folder.history()
    assert "wandb is not installed" in warning["message"]
    assert len(folder.steps()) == 5


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run needs. rows: the history by its line number, as the real one keeps it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: dict[int, dict[str, Any]] = {}
        self.run, self.summary = "", "{}"
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed resets its connection."""

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "cA==", "name": "project", "entity": {"id": "ZQ==", "name": "entity"}}
        bucket = {"id": "Yg==", "name": self.run, "displayName": "n", "config": "{}", "project": project}
        bucket |= {"historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"}
        if "RunResumeStatus" in query:
            tail = [json.dumps(self.rows[len(self.rows) - 1])] if self.rows else []
            bucket |= {"summaryMetrics": self.summary, "historyTail": json.dumps(tail), "tags": []}
            return {"model": project | {"bucket": bucket | {"wandbConfig": '{"t": 1}'} if self.run else None}}
        if "UpsertBucket" in query:
            self.run, new = given["name"], not self.run
            return {"upsertBucket": {"bucket": bucket | {"name": given["name"]}, "inserted": new}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "Yg==", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def do_PUT(self) -> None:
        self._read()
        self._reply({})

    def do_POST(self) -> None:
        asked = json.loads(self._read())
        if self.path.endswith("/graphql"):
            self._reply({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
            return
        files = asked.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            for line, text in enumerate(history["content"], history["offset"]):
                self.server.rows[line] = json.loads(text)
        if summary := files.get("wandb-summary.json"):
            self.server.summary = summary["content"][-1]
        self._reply({"exitcode": None, "limits": {}})

    def _read(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("lag", "shift"),
    [
        pytest.param(0, 0, id="plain"),
        pytest.param(4, 0, id="old summary", marks=pytest.mark.e2e),
        pytest.param(0, 5, id="synced with gaps", marks=pytest.mark.e2e),
    ],
)
def test_an_online_run_goes_on_where_the_server_stands(folder: RunFolder, server: Server, lag: int, shift: int) -> None:
    finish(begin(folder, 1, 30, mode="online", address=server.address))
    # a kill: the last rows never arrived
    server.rows = {line: row | {"_step": row["_step"] + shift} for line, row in server.rows.items() if line < 17}
    server.summary = json.dumps({"step": 17 - lag, "_step": 17 - lag + shift})
    finish(begin(folder, 21, 40, mode="online", address=server.address, attempt=1))
    assert [row["step"] for _, row in sorted(server.rows.items())] == list(range(1, 41))
    assert {row["step"]: row["loss"] for row in server.rows.values()} == losses(40)
    assert server.rows[39]["eval/loss"] == 2.0
    assert server.rows[39]["eval/model/module/books/loss"] == 1.5
    assert server.run == folder.facts()["wandb_id"]


def test_steps_logged_offline_reach_the_server_once_when_it_is_back(folder: RunFolder, server: Server) -> None:
    finish(begin(folder, 1, 10, mode="online", address=server.address))
    finish(begin(folder, 11, 30))
    assert sorted(read_offline_steps(folder.path)) == list(range(11, 31))
    finish(begin(folder, 26, 40, mode="online", address=server.address, attempt=2))
    assert [row["step"] for _, row in sorted(server.rows.items())] == list(range(1, 41))
    # a later `wandb sync` must not send them a second time
    assert list(folder.wandb.glob("offline-run-*/run-*.wandb.synced"))
