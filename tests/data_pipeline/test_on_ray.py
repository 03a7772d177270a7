"""Builds on a real Ray cluster of several nodes: the same bytes as here, whatever happens to a node."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from data_pipeline.files import sha256_file
from data_pipeline.manifest import TABLE
from tests.conftest import leviathan, start_leviathan, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CLUSTER = """
import os, sys, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
others = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.startswith("kill"):
        cluster.remove_node(others.pop(), allow_graceful=False)
        print("killed", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """A cluster of three nodes with one core each: its address, and a function that kills one of them."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    address = process.stdout.readline().strip()
    assert address, "the cluster did not come up"

    def kill() -> None:
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "killed"

    yield address, kill
    process.stdin.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def write(folder: Path, corpus: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        textwrap.dedent(f"""\
        data:
          dir: {folder / name}
          heldout: 0.1
          shard_mib: 0.02
          tokenizer: sp:300
          sources:
            letters: {{path: {corpus / "letters"}}}
            lists: {{path: {corpus / "lists"}, limit_mib: 0.08}}
        """)
    )
    return path


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in [*sorted(folder.glob("*.tar")), folder / TABLE]}


def build(cluster, config, **more):
    return leviathan("data", "build", config, "--on", "ray", "--address", cluster[0], timeout=200,
                     env={"RAY_AUTH_MODE": "disabled"}, **more)  # fmt: skip


def test_a_build_on_ray_gives_the_same_bytes(cluster, corpus, tmp_path):
    here = leviathan("data", "build", write(tmp_path, corpus, "here"))
    assert here.code == 0, here.err
    done = build(cluster, write(tmp_path, corpus, "there"))
    assert done.code == 0, done.err
    assert "3 cores of 3 nodes (Ray)" in done.out
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    again = build(cluster, write(tmp_path, corpus, "there"))
    assert again.code == 0
    assert "these shards were built before" in again.out


def test_a_node_that_dies_costs_time_alone(cluster, tmp_path):
    configs = []
    for name in ("here", "there"):
        configs.append(tmp_path / f"{name}.yaml")
        sources = "{python: {path: stdlib, limit_mib: 12}}"
        configs[-1].write_text(f"data: {{dir: {tmp_path / name}, shard_mib: 0.5, sources: {sources}}}\n")
    here = leviathan("data", "build", configs[0], timeout=200)
    assert here.code == 0, here.err
    words = ("data", "build", configs[1], "--on", "ray", "--address", cluster[0])
    process = start_leviathan(*words, env={"RAY_AUTH_MODE": "disabled"})
    there = tmp_path / "there"
    wait_until(lambda: len(list(there.glob("*.tar"))) >= 4, seconds=100)
    assert not (there / TABLE).exists(), "it was too fast to be disturbed"
    cluster[1]()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert files_of(there) == files_of(tmp_path / "here")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_an_address_where_no_cluster_answers_is_told(corpus, tmp_path, address):
    done = build((address,), write(tmp_path, corpus, "nowhere"))
    assert done.code == 78
    assert done.err.startswith(f"error: no Ray cluster answers at {address} (")
    assert done.err.count("\n") == 1
    assert done.seconds < 30


def test_words_that_are_no_address_are_told(corpus, tmp_path):
    done = build(("cluster",), write(tmp_path, corpus, "nowhere"))
    assert done.code == 78
    assert done.err.startswith("error: 'cluster' is no address of a Ray cluster; write HOST:PORT")
    without = leviathan("data", "build", write(tmp_path, corpus, "nowhere"), "--on", "ray", env={"RAY_ADDRESS": ""})
    assert without.code == 2
