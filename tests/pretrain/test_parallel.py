"""Ranks find each other, whoever else comes to the place where they meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from launcher.network import free_port

RANK = """
import sys, torch
from pretrain.parallel import finish, join, sum_over_ranks
join("gloo", 60)
print(int(sum_over_ranks(torch.ones(1)).item()), flush=True)
finish()
"""
STRAY_CLIENT = """
import sys, torch.distributed as dist
from datetime import timedelta
soon = timedelta(seconds=30)
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False, timeout=soon)
store.add("init/", 1)
for rank in range(2):
    for key in ("rank_", "", "default_pg/0//cpu//"):
        store.set(f"{key}{rank}", "a stranger's")
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def port():
    return free_port("127.0.0.1")


def start(rank, port, nonce="a" * 32, host="127.0.0.1"):
    environment = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port),
        "LEVIATHAN_NONCE": nonce, "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", RANK], env=environment, stdout=subprocess.PIPE, text=True)


def connected(port):
    """A connection to rank 0, as soon as it listens."""
    end = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.05)


def ended(*ranks):
    outputs = [rank.communicate(timeout=90)[0].strip() for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]


def test_strangers_at_the_door_are_no_ranks(port):
    first = start(0, port)
    strays = [connected(port) for _ in range(8)]
    for number, stray in enumerate(strays):
        stray.sendall([b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, os.urandom(512), b""][number % 4])
    client = subprocess.Popen([sys.executable, "-c", STRAY_CLIENT, str(port)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert client.stdout.readline().strip() == "there"
    assert ended(first, start(1, port)) == [(0, "2"), (0, "2")]
    client.communicate(timeout=30)
    for stray in strays:
        stray.close()


@pytest.mark.e2e
def test_a_rank_of_an_earlier_attempt_is_not_met(port):
    first = start(0, port)
    connected(port).close()
    late = start(1, port, nonce="b" * 32)
    time.sleep(3)
    assert first.poll() is None, "it still waits for its own"
    assert ended(first, start(1, port)) == [(0, "2"), (0, "2")]
    late.kill()
    late.communicate()


def test_ranks_listen_at_the_address_they_are_told_and_nowhere_else(port):
    first = start(0, port)
    connected(port).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    assert ended(first, start(1, port)) == [(0, "2"), (0, "2")]


@pytest.mark.e2e
def test_ranks_meet_over_ipv6_too(port):
    assert ended(start(0, port, host="::1"), start(1, port, host="::1")) == [(0, "2"), (0, "2")]
