"""The odd node is named, with what is odd; what is only slow stops nothing. Nodes themselves are in tests/faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from launcher.network import free_port
from launcher.preflight import ENDED, WAIT_S, collect, folder_of, judge, kept_waiting, log_of, summary
from pretrain.run_folder import RunFolder

FIT = {
    "code": "code-1", "config": "c", "python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "gpus": 8,
    "cores": 64, "flops": 1e12, "memory_free": 64 << 30, "disk_free": 1 << 40, "shm_free": 64 << 30, "fsync_s": 0.001,
    "clock_s": 0.0,
}  # fmt: skip


def nodes(count, **odd):
    reports = [FIT | {"node": f"n{number}"} for number in range(1, count + 1)]
    reports[-1] |= odd
    return reports


def test_nodes_that_agree_are_fit():
    assert judge(nodes(4)) == []
    assert judge(nodes(1)) == []
    assert summary(nodes(4)) == "4 nodes are fit: 1,000 to 1,000 GFLOP/s"


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"code": "code-2"}, "has code code-2, the other 3 code-1"),
        ({"config": "d"}, "has configuration d, the other 3 c"),
        ({"torch": "2.11.0"}, "has torch 2.11.0, the other 3 2.13.0"),
        ({"python": "3.12.1"}, "has Python 3.12.1, the other 3 3.11.7"),
        ({"gpus": 7}, "has GPUs 7, the other 3 8"),
        ({"memory_free": 1 << 29}, "has only 512.0 MB of memory free"),
        ({"error": "cannot speak with the other nodes: refused"}, "cannot speak with the other nodes: refused"),
        ({"error": ENDED}, "ended while nodes spoke with each other"),
    ],
)
def test_a_node_that_is_not_like_the_others_stops_a_run(odd, message):
    (finding,) = judge(nodes(4, **odd))
    assert finding.host == "n4"
    assert finding.stops
    assert finding.message.replace("536.9 MB", "512.0 MB").replace("512.0 MiB", "512.0 MB") == message


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"flops": 4e11}, "is slow: matrix products at 4e+11 FLOP/s, the others 1e+12"),
        ({"fsync_s": 0.1}, "is slow: a durable write at 0.1 s, the others 0.001"),
        ({"shm_free": 64 << 20}, "has only 67.1 MB free in /dev/shm; NCCL and Ray want more"),
        ({"clock_s": -3.0}, "its clock is -3.0 s off the others'; dates in logs will mislead"),
    ],
)
def test_a_node_that_is_only_slow_is_named(odd, message):
    (finding,) = judge(nodes(4, **odd))
    assert (finding.host, finding.message, finding.stops) == ("n4", message, False)


def test_of_two_nodes_the_first_is_the_measure():
    (finding,) = judge(nodes(2, torch="2.11.0"))
    assert (finding.host, finding.message) == ("n2", "has torch 2.11.0, n1 2.13.0")


def test_who_waited_in_vain_for_another_is_not_to_blame():
    waited = {"error": "cannot speak with the other nodes: timed out"}
    assert judge([FIT | waited | {"node": "n1"}], silent=True) == []
    (finding,) = judge([FIT | waited | {"node": "n1"}, FIT | {"error": ENDED, "node": "n2"}])
    assert (finding.host, finding.message) == ("n2", ENDED)
    both = judge([FIT | waited | {"node": node} for node in ("n1", "n2")])
    assert [finding.host for finding in both] == ["n1", "n2"]


@pytest.mark.parametrize(
    "left",
    [
        "Gloo connectFullMesh failed with [tcp/pair.cc:553] Connection closed by peer [10.77.2.3]:26859. This is",
        "[tcp/pair.cc:547] Read error [10.77.2.3]:26859: Connection reset by peer",
        "[c10d] recvValue failed on SocketImpl(fd=3): failed to recv, got 0 bytes. Connection was likely closed.",
    ],
)
@pytest.mark.parametrize("waited", [False, True])
def test_who_was_left_by_another_is_not_to_blame(left, waited):
    said = "cannot speak with the other nodes: "
    failed = FIT | {"error": f"{said}connect: no route to host", "node": "n3"}
    others = [FIT | {"error": said + left, "node": "n1"}, FIT | {"node": "n2"}]
    (finding,) = judge([*others, failed], waited=waited)
    assert finding.host == "n3"
    (finding,) = judge(others, waited=waited)
    assert finding.host == "n1", "where nobody says why, who was left is the only trace"


def test_who_was_ended_while_it_waited_is_not_to_blame_either():
    failed = {"error": "cannot speak with the other nodes: no route", "node": "n2"}
    (finding,) = judge([FIT | failed, FIT | {"error": ENDED, "node": "n1"}], waited=True)
    assert (finding.host, finding.message) == ("n2", failed["error"])
    (finding,) = judge([FIT | {"error": ENDED, "node": "n1"}, FIT | {"node": "n2"}], waited=True)
    assert finding.host == "n1", "where nobody says why, who is missing is to blame"


def test_nodes_were_kept_waiting_if_the_last_of_them_left_long_ago(tmp_path):
    run = RunFolder(tmp_path)
    folder_of(run).mkdir()
    report = folder_of(run) / "00000.json"
    report.touch()
    assert not kept_waiting(run)
    os.utime(report, (time.time() - WAIT_S,) * 2)
    assert kept_waiting(run)


def test_a_node_that_runs_other_code_and_so_reports_other_things_is_named(tmp_path):
    run = RunFolder(tmp_path)
    folder_of(run).mkdir()
    older = {key: value for key, value in FIT.items() if key != "shm_free"} | {"code": "code-0"}
    (folder_of(run) / "00000.json").write_text(json.dumps(older))
    reports, (finding,) = collect(run, ["n1"])
    assert not reports
    assert (finding.message, finding.stops) == ("has other code (code-0), which reports other things", True)


def test_the_last_words_of_a_node_that_does_not_report_are_told(tmp_path):
    run = RunFolder(tmp_path)
    run.make()
    log_of(run, 0).write_text("Traceback …\n\nModuleNotFoundError: No module named 'torch'\n\n")
    _, (finding,) = collect(run, ["n1"])
    assert finding.message.endswith("; it said: ModuleNotFoundError: No module named 'torch'")


def test_a_node_that_does_not_report_is_named(tmp_path):
    run = RunFolder(tmp_path)
    folder_of(run).mkdir()
    (folder_of(run) / "00000.json").write_text(json.dumps(FIT))
    (folder_of(run) / "00001.json").write_text("{")
    reports, silent = collect(run, ["n1", "n2", "n3"])
    assert [report["node"] for report in reports] == ["n1"]
    assert [(finding.host, finding.stops) for finding in silent] == [("n2", True), ("n3", True)]


@pytest.mark.e2e
def test_two_nodes_measure_themselves_and_each_other(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.make()
    run.config.write_text("run: {}")
    run.launch.write_text("ranks: 2")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "GLOO_SOCKET_IFNAME": "lo",
              "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "LOCAL_RANK": "0"}  # fmt: skip
    words = [sys.executable, "-m", "launcher.preflight", str(run.path)]
    both = [subprocess.Popen(words, env=os.environ | common | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    reports, silent = collect(run, ["n1", "n2"])
    assert not silent
    assert judge(reports) == []
    assert abs(reports[1]["clock_s"]) < 1
    assert "all-reduce" in summary(reports)
