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
from tests.conftest import leviathan

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


def test_an_address_where_no_cluster_answers_is_told(corpus, tmp_path):
    done = build(("127.0.0.1:1",), write(tmp_path, corpus, "nowhere"))
    assert done.code == 78
    assert done.err.startswith("error: no Ray cluster answers at 127.0.0.1:1 (")
    assert done.err.count("\n") == 1
