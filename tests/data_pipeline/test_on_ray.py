"""Builds on a real Ray cluster of several nodes: the same bytes as here, whatever happens to a node."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import fsspec
import pytest

from data_pipeline.files import sha256_file
from data_pipeline.manifest import TABLE
from tests.conftest import leviathan, start_leviathan, wait_until
from tests.data_pipeline import stores

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CLUSTER = """
import os, sys, time
from ray.cluster_utils import Cluster
# port 0 is any that is free: a head's agent has one and the same everywhere if nothing is said
head = {"num_cpus": 1, "include_dashboard": False, "dashboard_agent_listen_port": 0}
cluster = Cluster(initialize_head=True, head_node_args=head)
others = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.startswith("kill"):
        cluster.remove_node(others.pop(), allow_graceful=False)
        print("killed", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def store():
    """An S3 for the nodes, which have its keys in their environment as on a real cluster."""
    with stores.s3() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(store):
    """A cluster of three nodes with one core each: its address, and a function that kills one of them."""
    environment = os.environ | store.env | {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
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


def build(cluster, config, *words, env=None):
    return leviathan("data", "build", config, *words, "--on", "ray", "--address", cluster[0], timeout=200,
                     env={"RAY_AUTH_MODE": "disabled"} | (env or {}))  # fmt: skip


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


def test_a_build_on_ray_into_a_store_gives_the_same_bytes(cluster, store, corpus, tmp_path, monkeypatch):
    here = leviathan("data", "build", write(tmp_path, corpus, "here"))
    assert here.code == 0, here.err
    done = build(cluster, write(tmp_path, corpus, "there"), "data.dir=s3://bucket/there", env=store.env)
    assert done.code == 0, done.err
    assert "building s3://bucket/there from letters, lists with 3 cores of 3 nodes (Ray)" in done.out
    for key, value in store.env.items():
        monkeypatch.setenv(key, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    sent = {key.rpartition("/")[2]: hashlib.sha256(fs.cat_file(key)).hexdigest() for key in fs.ls("bucket/there")
            if key.endswith((".tar", TABLE))}  # fmt: skip
    assert sent == files_of(tmp_path / "here")
    again = build(cluster, write(tmp_path, corpus, "there"), "data.dir=s3://bucket/there", env=store.env)
    assert "these shards were built before" in again.out


ALL_AT_ONCE = """
import sys
from operator import add
from pathlib import Path
from benchmarks.data_build import meet
from data_pipeline.on_ray import ray_executor
with ray_executor(sys.argv[1]) as there:
    meet(there, Path(sys.argv[2]), there.cores)
    print(there.submit(add, 1, 2).result())
"""


def test_all_nodes_work_at_the_same_time(cluster, tmp_path):
    command = [sys.executable, "-c", ALL_AT_ONCE, cluster[0], str(tmp_path / "meet")]
    done = subprocess.run(command, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.stdout.strip() == "3", done.stderr
    assert len(list((tmp_path / "meet").iterdir())) == 3, "three cores, one on each node"


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
