"""Signs of life over a real socket: of ranks of this attempt, and of nobody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from launcher.beacons import Beacons
from pretrain.beacon import RECORD
from pretrain.health import PHASES
from tests.conftest import wait_until

RANK = """
import sys, time
from pretrain.health import Heartbeat
heartbeat = Heartbeat.from_environment(1)
heartbeat.at("data", 6)
heartbeat.at("step", 7)
time.sleep(60)
"""


@pytest.fixture
def beacons():
    listening = Beacons("127.0.0.1", world=2)
    yield listening
    listening.close()


@pytest.fixture
def rank(beacons):
    environment = os.environ | {"LEVIATHAN_BEACON": beacons.next_attempt()}
    process = subprocess.Popen([sys.executable, "-c", RANK], env=environment)
    wait_until(lambda: beacons.beats()[1] is not None and beacons.beats()[1].step == 7, 30)
    yield process
    process.kill()
    process.wait()


def test_a_rank_tells_where_it_is_and_since_when(beacons, rank):
    first = beacons.beats()[1]
    assert (first.step, first.phase) == (7, "step")
    time.sleep(3)
    # what was told is read when somebody asks: up to a second later
    assert beacons.beats()[1].age_s == pytest.approx(first.age_s + 3, abs=1.5), "a step that goes on grows old"
    assert beacons.beats()[0] is None


def test_a_rank_that_is_stopped_grows_old(beacons, rank):
    assert beacons.silent(2.0) == set()
    os.kill(rank.pid, signal.SIGSTOP)
    before = beacons.beats()[1].age_s
    time.sleep(2.5)
    assert beacons.beats()[1].age_s >= before + 2.4
    assert beacons.silent(2.0) == {1}


def test_what_is_of_no_rank_of_this_attempt_is_not_heard(beacons):
    where = beacons.next_attempt()
    host, port, nonce = where.rsplit(":", 2)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def send(data):
        sender.sendto(data, (host, int(port)))

    def record(nonce, rank=0, phase=1):
        return RECORD.pack(nonce, rank, 0.0, 1, phase, 0)

    send(b"")
    send(b"GET / HTTP/1.1")
    send(record(bytes(16)))
    send(record(bytes.fromhex(nonce), rank=2))
    send(record(bytes.fromhex(nonce), phase=99))
    send(record(bytes.fromhex(nonce)) + b"more")
    wait_until(lambda: beacons.beats() is not None and beacons.strangers == 6, 5)
    assert beacons.beats() == {0: None, 1: None}
    send(record(bytes.fromhex(nonce)))
    wait_until(lambda: beacons.beats()[0] is not None, 5)
    beacons.next_attempt()
    send(record(bytes.fromhex(nonce)))
    wait_until(lambda: beacons.beats() is not None and beacons.strangers == 7, 5)
    assert beacons.beats() == {0: None, 1: None}, "ranks of an earlier attempt are strangers"
    sender.close()


def test_an_address_of_ipv6_is_no_other():
    beacons = Beacons("::1", world=1)
    environment = os.environ | {"LEVIATHAN_BEACON": beacons.next_attempt()}
    process = subprocess.Popen([sys.executable, "-c", RANK.replace("(1)", "(0)")], env=environment)
    try:
        wait_until(lambda: beacons.beats()[0] is not None, 30)
    finally:
        process.kill()
        process.wait()
        beacons.close()


def test_thousands_of_ranks_are_heard_through_the_smallest_buffer_that_linux_grants():
    """None of them may look silent only because the supervisor reads twice a second."""
    world = 4000
    many = Beacons("127.0.0.1", world)
    many._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 212_992)
    host, port, nonce = many.next_attempt().rsplit(":", 2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for rank in range(world):
            sender.sendto(RECORD.pack(bytes.fromhex(nonce), rank, 0.0, 1, PHASES.index("step"), 0), (host, int(port)))
            if rank % 100 == 99:
                time.sleep(1.0 / (world / 100))
    wait_until(lambda: None not in many.beats().values(), 5)
    assert many.silent(5.0) == set()
    many.close()
