"""One node of a real Slurm is not like the other: `doctor --nodes` names it, and a job stops before any rank starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from launcher.snapshot import PACKAGES, ROOT
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, wait_until
from tests.mini_slurm import MiniSlurm, missing

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(missing() is not None and os.environ.get("SLURM_TESTS") != "required", reason=missing() or ""),
]


@pytest.fixture(scope="module")
def cluster():
    with MiniSlurm(2) as slurm:
        yield slurm


def only_on_n2(folder, *lines):
    """Words before Python, as of a container, that do something else on node n2."""
    script = folder / "wrapper.sh"
    script.write_text("\n".join(["#!/bin/sh", 'if [ "$SLURMD_NODENAME" = n2 ]; then', *lines, "fi", 'exec "$@"', ""]))
    script.chmod(0o700)
    return f"launch.slurm.wrapper=[{script}]"


def other_code(folder):
    """A copy of the project in which somebody has changed a line."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "other" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "other" / "pretrain" / "trainer.py", "a") as file:
        file.write("# changed\n")
    return f"export PYTHONPATH={folder / 'other'}"


def doctor(cluster, folder, *words, before=("salloc", "--nodes=2")):
    """The command as an administrator calls it, in a folder of its own."""
    (folder / "here").mkdir()
    done = subprocess.run(
        [*before, sys.executable, "-m", "launcher", "doctor", "--nodes", *words], cwd=folder / "here",
        env=os.environ | cluster.env, text=True, capture_output=True, timeout=150, check=False,
    )  # fmt: skip
    assert not list((folder / "here").iterdir()), "nothing is left behind"
    return done


def rows(done):
    """State and cells of each node."""
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[1]: words for words in lines if len(words) > 1 and words[1] in ("n1", "n2") and words[0] != "node"}


def test_nodes_that_are_alike_are_fit_and_have_a_row_each(cluster, tmp_path):
    done = doctor(cluster, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done)
    assert {node: words[0] for node, words in found.items()} == {"n1": "ok", "n2": "ok"}
    assert all(words[-1].startswith("code-") and float(words[4].replace(",", "")) > 0 for words in found.values())
    assert "all-reduce " in done.stdout
    assert "2 nodes are fit" in done.stdout


def test_a_batch_script_may_ask_as_well(cluster, tmp_path):
    out, command = tmp_path / "out", f"{sys.executable} -m launcher doctor --nodes"
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", f"--chdir={tmp_path}", f"--output={out}", "--wrap", command
    ).strip()
    wait_until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), seconds=120)
    assert cluster.state(job) == "COMPLETED", out.read_text()
    assert "2 nodes are fit" in out.read_text()


def test_a_node_with_other_code_is_named(cluster, tmp_path):
    done = doctor(cluster, tmp_path, only_on_n2(tmp_path, other_code(tmp_path)))
    assert done.returncode == 78, done.stdout + done.stderr
    found = rows(done)
    assert {node: words[0] for node, words in found.items()} == {"n1": "ok", "n2": "fail"}
    assert f"node n2 has code {found['n2'][-1]}, n1 {found['n1'][-1]}" in done.stdout
    assert "1 of 2 nodes are not fit" in done.stdout
    assert "--exclude=n2" in done.stdout


def test_a_node_that_cannot_start_is_named_and_the_one_that_waits_for_it_is_not(cluster, tmp_path):
    began = time.monotonic()
    done = doctor(cluster, tmp_path, only_on_n2(tmp_path, "echo no such image; exit 1"))
    assert time.monotonic() - began < 100
    assert done.returncode == 78, done.stdout + done.stderr
    assert {node: words[0] for node, words in rows(done).items()} == {"n1": "ok", "n2": "fail"}
    assert "node n2 did not report" in done.stdout
    assert "it said: no such image" in done.stdout
    assert "node n1" not in done.stdout


def test_no_node_is_blamed_for_what_the_job_does_not_have(cluster, tmp_path):
    done = doctor(cluster, tmp_path, "launch.slurm.cpus_per_rank=4096")
    assert done.returncode == 78
    assert "error: nothing was started on any node (srun: error: " in done.stderr
    assert "n1" not in done.stdout


def test_within_a_step_of_a_job_it_measures_nothing(cluster, tmp_path):
    done = doctor(cluster, tmp_path, before=("srun", "--nodes=1"))
    assert done.returncode == 2
    assert "is at work (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_with_an_odd_node_stops_before_any_rank_starts(cluster, tiny, tmp_path):
    wrapper = only_on_n2(tmp_path, other_code(tmp_path))
    done = leviathan("submit", "slurm", tiny, "--nodes", 2, "--ranks", 2, wrapper, env=cluster.env)
    assert done.code == 0, done.err
    run = RunFolder(tiny.parent / "runs" / "tiny")
    job = run.facts()["job"]["slurm"]
    wait_until(lambda: cluster.state(job) == "FAILED", seconds=120)
    assert cluster.exit_code(job) == "78:0"
    assert cluster.restarts(job) == 0
    assert not events(run, "launch")
    assert not list(run.logs.glob("rank_*"))
    (warning,) = events(run, "warning")
    assert warning.startswith("node n2 has code code-")
    told = leviathan("why", run.path, env=cluster.env)
    assert "node n2 has code" in told.out
    assert "--exclude" in told.out


def test_a_node_whose_datagrams_do_not_arrive_is_named_in_a_job_and_not_from_a_login_node(tiny, tmp_path):
    rule = ["ip", "rule", "add", "ipproto", "udp", "dport", "1024-65534", "blackhole"]
    with MiniSlurm(2, apart=True) as cluster:
        subprocess.run(cluster.network.inside(2, rule), check=True, timeout=20)
        fit = doctor(cluster, tmp_path)
        assert fit.returncode == 0, fit.stdout + fit.stderr
        done = leviathan("submit", "slurm", tiny, "--nodes", 2, "--ranks", 2, env=cluster.env)
        assert done.code == 0, done.err
        run = RunFolder(tiny.parent / "runs" / "tiny")
        job = run.facts()["job"]["slurm"]
        wait_until(lambda: cluster.state(job) == "FAILED", seconds=120)
        assert cluster.exit_code(job) == "78:0"
    (warning,) = events(run, "warning")
    assert warning == "node n2 cannot send datagrams (UDP) to n1, which watches over the run; open the firewall"
    assert not events(run, "launch")
