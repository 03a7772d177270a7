"""Addresses and interfaces are found by the route, not by a host's name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from configs.errors import ConfigError
from launcher.network import address_of_first, family_of, free_port, interface_towards, own_address_towards
from tests import network
from tests.conftest import ROOT, wait_until
from tests.network import Network


def test_loopback_is_reached_through_loopback():
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("::1") == "lo"


def test_every_interface_leads_to_its_own_address():
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family == socket.AF_INET:
                assert own_address_towards(entry.address) == entry.address


def test_a_name_that_resolves_to_nothing_is_told():
    with pytest.raises(ConfigError, match=r"cannot resolve no-such-node\.invalid .*NodeAddr"):
        own_address_towards("no-such-node.invalid")


def test_a_port_for_another_host_is_one_that_nobody_has_here():
    with socket.socket() as taken:
        taken.bind(("", free_port("203.0.113.7")))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_free_port_can_be_taken(host):
    with socket.socket(family_of(host), socket.SOCK_STREAM) as taken:
        taken.bind((host, free_port(host)))


def test_of_nodes_apart_the_first_ones_own_address_stays():
    here = next(entry.address for entry in psutil.net_if_addrs()["lo"] if entry.family == socket.AF_INET)
    assert address_of_first(["203.0.113.7", "203.0.113.8"]) == "203.0.113.7"
    assert address_of_first([here]) == here
    assert address_of_first([here, here]) == here, "all of them are on this machine"


APART = pytest.mark.skipif(network.missing() is not None, reason=network.missing() or "")
RANK = """
import os, socket, sys
from launcher.network import interface_towards, own_address_towards
first = os.environ["MASTER_ADDR"]
print(socket.gethostbyname(socket.gethostname()), own_address_towards(first), interface_towards(first), flush=True)
os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(first)
import torch
from pretrain.parallel import join, sum_over_ranks
join("gloo", 60.0)
print(sum_over_ranks(torch.ones(1)).item(), flush=True)
"""


@APART
@pytest.mark.parametrize("family", [4, 6])
def test_nodes_whose_names_lead_to_loopback_meet_by_addresses(family):
    with Network(2) as nodes:
        address = {4: nodes.address, 6: nodes.address6}[family]
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": address(1), "MASTER_PORT": "29400", "LEVIATHAN_NONCE": "n"}
        for number in (1, 2):
            nodes.start(number, ["sleep", "100"], os.environ)
        wait_until(lambda: all(nodes.processes(number)[1:] for number in (1, 2)), 10)
        ranks = [
            subprocess.Popen(
                nodes.inside(number, [sys.executable, "-c", RANK]), env=os.environ | told | {"RANK": str(number - 1)},
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for number in (1, 2)
        ]  # fmt: skip
        said = [rank.communicate(timeout=90) for rank in ranks]
        own = [address(number) for number in (1, 2)]
    for number in (1, 2):
        assert said[number - 1][0].split() == ["127.0.1.1", own[number - 1], "eth0", "2.0"], said[number - 1][1]


@APART
@pytest.mark.parametrize("family", [4, 6])
def test_a_first_node_whose_own_name_leads_to_loopback_is_met_where_the_others_reach_it(family):
    ask = "import sys; from launcher.network import address_of_first; print(address_of_first(sys.argv[1:]))"
    with Network(2) as nodes:
        address = {4: nodes.address, 6: nodes.address6}[family]
        nodes.start(1, ["sleep", "100"], os.environ)
        wait_until(lambda: nodes.processes(1)[1:], 10)
        words = nodes.inside(1, [sys.executable, "-c", ask, "n1", address(2)])
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == address(1), done.stderr
