"""Addresses and interfaces are found by the route, not by a host's name."""

from __future__ import annotations

import socket

import psutil
import pytest

from configs.errors import ConfigError
from launcher.network import family_of, free_port, interface_towards, own_address_towards


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
