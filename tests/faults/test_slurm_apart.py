"""Runs in jobs of a Slurm whose nodes are as far apart as real ones: a node dies, is cut off, or strangers call."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time

import psutil
import pytest

from pretrain.beacon import NONCE_BYTES, RECORD
from tests.conftest import events, wait_until
from tests.mini_slurm import MISSED_S, MiniSlurm, missing
from tests.small_job import JOB_S, QUICK, assert_ended, assert_same, processes_of, submit

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None and os.environ.get("SLURM_TESTS") != "required", reason=missing() or ""),
]

REST = {"LEVIATHAN_FAULT": "step.before_forward:0:12:sleep=60"}
"""Rank 0 rests in the first attempt, so that something can happen to a node meanwhile."""
LONG_S = 300
"""What clusters have: Slurm takes no node for dead before these tests are over."""


def submit_and_rest(cluster, config, *words, env=REST):
    """A run that has a checkpoint of step 10 and rests in step 12."""
    run, job = submit(cluster, config, QUICK, *words, env=env)
    wait_until(lambda: run.committed_steps()[:1] == [10] and len(run.steps()) == 12, seconds=JOB_S)
    return run, job


def assert_undisturbed(cluster, run, job, undisturbed):
    """It ended well, as if nothing had happened, and left no process anywhere."""
    assert_ended(cluster, run, job)
    assert_same(run, undisturbed)
    wait_until(lambda: not processes_of(run), seconds=20)


@pytest.mark.parametrize("number", [1, 2])
def test_a_node_that_dies_is_replaced_and_costs_time_alone(tiny, undisturbed, number):
    with MiniSlurm(3, apart=True) as cluster:
        run, job = submit_and_rest(cluster, tiny)
        cluster.network.kill(number)  # the first one has the supervisor and rank 0
        wait_until(lambda: cluster.restarts(job) == 1, seconds=90)
        assert_undisturbed(cluster, run, job, undisturbed)
    left = {1: "n2, n3", 2: "n1, n3"}[number]
    assert events(run, "launch") == [
        f"attempt 0: starting 2 ranks on n1, n2 (Slurm job {job})",
        f"attempt 1: starting 2 ranks on {left} (Slurm job {job}, start 2)",
    ]
    assert events(run, "resume") == ["resumed from step_000000010"]


@pytest.mark.parametrize("number", [1, 2])
def test_where_no_node_is_left_over_a_job_waits_for_the_dead_one(tiny, undisturbed, number):
    with MiniSlurm(2, apart=True) as cluster:
        run, job = submit_and_rest(cluster, tiny)
        cluster.network.kill(number)
        wait_until(lambda: cluster.restarts(job) == 1 and cluster.state(job) == "PENDING", seconds=90)
        cluster.start_at_once(job)
        time.sleep(3)
        assert cluster.state(job) == "PENDING"
        cluster.start_node(number)
        assert_undisturbed(cluster, run, job, undisturbed)
    # once more at most: where Slurm takes the word of a node that was dead for the end of the job's new start (below)
    again = events(run, "restart", "requeue")
    assert len(again) <= 1 and len(events(run, "launch")) == 2 + len(again), run.history()


def test_a_job_whose_nodes_slurm_has_lost_count_of_is_queued_again(tiny, undisturbed, tmp_path):
    # Slurm asks a dead node to end its job until it answers. Here it answers when the job runs there again, and Slurm
    # takes that for the new start's end; only then does the supervisor of that start, the second one, begin.
    late = tmp_path / "late.sh"
    late.write_text('if [ "${SLURM_RESTART_COUNT:-0}" = 1 ]; then sleep 5; fi\n')
    with MiniSlurm(2, apart=True) as cluster:
        run, job = submit_and_rest(cluster, tiny, f"launch.slurm.env_file={late}")
        cluster.network.kill(2)
        cluster.network.mute(2, cluster.daemons_port)
        wait_until(lambda: cluster.restarts(job) == 1 and cluster.state(job) == "PENDING", seconds=90)
        cluster.start_node(2)
        cluster.start_at_once(job)
        wait_until(lambda: cluster.state(job) == "RUNNING", seconds=30)
        cluster.network.unmute(2, cluster.daemons_port)
        assert_undisturbed(cluster, run, job, undisturbed)
    (warning,) = [said for said in events(run, "warning") if "start nothing on its own nodes" in said]
    assert warning.startswith(f"Slurm lets job {job} start nothing on its own nodes, and has not for 30 s")
    (again,) = events(run, "requeue")
    assert again.endswith("it goes on from step 10")
    assert len(events(run, "launch")) == 3


def test_a_node_that_comes_back_before_slurm_has_missed_it_goes_on_in_the_same_job(tiny, undisturbed):
    with MiniSlurm(2, apart=True, timeout_s=LONG_S) as cluster:
        run, job = submit_and_rest(cluster, tiny)
        cluster.network.kill(2)
        wait_until(lambda: any("does not answer" in said for said in events(run, "warning")), seconds=90)
        time.sleep(3)
        assert len(events(run, "launch")) == 1, "no rank is started while a node is away"
        cluster.start_node(2)
        assert_undisturbed(cluster, run, job, undisturbed)
        assert cluster.restarts(job) == 0
    (fault,) = events(run, "fault")
    assert fault.startswith(f"rank 1 (host n2, Slurm job {job}): no progress for")
    assert "node n2 does not answer; the run waits until it does, or is started elsewhere" in events(run, "warning")


def test_a_first_node_that_comes_back_before_slurm_has_missed_it_begins_the_job_again(tiny, undisturbed):
    with MiniSlurm(2, apart=True, timeout_s=LONG_S) as cluster:
        run, job = submit_and_rest(cluster, tiny, env={"LEVIATHAN_FAULT": "step.before_forward:0:12:sleep=90"})
        cluster.network.kill(1)
        # Slurm counts from the job's last step, which began just after its launch was told, and in whole seconds
        (launched,) = (event["time"] for event in run.history() if event["event"] == "launch")
        time.sleep(max(0.0, launched + MISSED_S + 3 - time.time()))
        cluster.start_node(1)
        wait_until(lambda: cluster.restarts(job) == 1, seconds=90)
        assert_undisturbed(cluster, run, job, undisturbed)


def test_a_cable_that_is_out_for_a_while_costs_no_more_than_a_restart(tiny, undisturbed):
    with MiniSlurm(2, apart=True, timeout_s=LONG_S) as cluster:
        run, job = submit_and_rest(cluster, tiny, "launch.hang_s=5")
        cluster.network.cut(2)
        wait_until(lambda: any("does not answer" in said for said in events(run, "warning")), seconds=90)
        cluster.network.mend(2)
        assert_undisturbed(cluster, run, job, undisturbed)
        assert cluster.restarts(job) == 0


def test_a_supervisor_that_slurm_has_lost_sight_of_does_not_hold_its_run_back(tiny, undisturbed):
    with MiniSlurm(3, apart=True) as cluster:
        run, job = submit_and_rest(cluster, tiny)
        cluster.network.cut(1)  # it lives on there, and renews its lease
        wait_until(lambda: cluster.restarts(job) == 1, seconds=90)
        assert_ended(cluster, run, job)
        assert processes_of(run), "the first supervisor was not there to hold anything back"
        assert_same(run, undisturbed)
        cluster.network.mend(1)
        wait_until(lambda: not processes_of(run), seconds=60)
        assert_same(run, undisturbed)
    assert len(events(run, "launch")) == 2
    assert run.history()[-1]["event"] == "done", "what the first supervisor finds at last is no news of the run"


def test_a_node_that_is_cut_off_is_named_before_the_run_begins(tiny):
    with MiniSlurm(3, apart=True, timeout_s=LONG_S) as cluster:
        cluster.network.cut(3)
        run, job = submit(cluster, tiny, "--nodes", 3, "--ranks", 3, "train.batch_rows=12")
        wait_until(lambda: len(events(run, "stop")) == 1, seconds=JOB_S)
        cluster.network.mend(3)  # Slurm waits for it before a job is over
        assert_ended(cluster, run, job, "FAILED")
        assert cluster.exit_code(job) == "78:0"
    (stop,) = events(run, "stop")
    assert "node n3 does not answer n1" in stop
    assert "exclude it" in stop
    assert "node n1" not in stop and "node n2" not in stop
    assert not events(run, "launch")


def test_a_node_that_does_not_reach_another_is_named_and_those_that_waited_for_it_are_not(tiny):
    with MiniSlurm(3, apart=True) as cluster:
        cluster.network.part(3, 2)
        run, job = submit(cluster, tiny, "--nodes", 3, "--ranks", 3, "train.batch_rows=12")
        assert_ended(cluster, run, job, "FAILED")
        assert cluster.exit_code(job) == "78:0"
    (stop,) = events(run, "stop")
    assert "node n3 cannot speak with the other nodes" in stop
    assert "node n1" not in stop and "node n2" not in stop


STRANGER = """
import sys, torch.distributed as dist
host, port = sys.argv[1:]
store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
for name in ("0", "1", "worker_count", "init/", "store_based_barrier_key:1"):
    store.set(name, "stranger")
    store.add("count/" + name, 1)
print("wrote", flush=True)
"""


def test_strangers_are_never_counted_as_ranks(tiny, undisturbed, tmp_path):
    spoken = tmp_path / "spoken"
    with MiniSlurm(2, apart=True) as cluster:
        rest = {"LEVIATHAN_FAULT": f"step.before_forward:0:12:until={spoken}"}
        run, job = submit(cluster, tiny, QUICK, "launch.hang_s=120", env=rest)
        wait_until(lambda: len(_ranks(run)) == 2, seconds=JOB_S)
        told = min(_ranks(run), key=lambda rank: int(rank["RANK"]))
        assert told["MASTER_ADDR"] == cluster.network.address(1)
        meeting = told["MASTER_ADDR"], int(told["MASTER_PORT"])
        held = _call_until_taken(meeting)  # from the moment that rank 0 listens, before rank 1 is there
        wait_until(lambda: len(run.steps()) == 12, seconds=JOB_S)
        spoke = subprocess.run([sys.executable, "-c", STRANGER, meeting[0], str(meeting[1])], capture_output=True,
                               text=True, timeout=60)  # fmt: skip
        assert "wrote" in spoke.stdout, "the stranger did not get through: there is nothing to withstand"
        host, port, nonce = told["LEVIATHAN_BEACON"].rsplit(":", 2)
        _send_datagrams((host, int(port)), bytes.fromhex(nonce))
        spoken.touch()  # the rank rests a second longer: whoever believed a datagram finds a hang meanwhile
        assert_undisturbed(cluster, run, job, undisturbed)
        held.close()
    assert not events(run, "fault", "restart")


def _ranks(run):
    """What every rank of a run is told, wherever it is."""
    found = []
    for process in processes_of(run):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if "pretrain.run" in process.cmdline() and "LOCAL_SIZE" in environment:
            found.append(environment)
    return found


def _call_until_taken(where):
    """A connection that says something that means nothing, and stays."""
    end = time.monotonic() + JOB_S
    while True:
        try:
            held = socket.create_connection(where, timeout=2)
        except OSError:
            assert time.monotonic() < end, "rank 0 never listened"
            time.sleep(0.02)
            continue
        held.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 16)
        return held


def _send_datagrams(where, nonce):
    """Noise, a word under a false nonce that a rank hangs, and one under the true nonce from a rank that cannot be."""
    hangs = 3600.0, 3, 3, 1000
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for _ in range(200):
            for word in (
                b"", secrets.token_bytes(7), secrets.token_bytes(9000), secrets.token_bytes(RECORD.size),
                RECORD.pack(bytes(NONCE_BYTES), 1, *hangs), RECORD.pack(nonce, 4000, *hangs),
            ):  # fmt: skip
                stranger.sendto(word, where)
