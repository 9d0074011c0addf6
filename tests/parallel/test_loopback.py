"""A machine without IPv4: here, one that refuses 127.0.0.1."""

import os
import socket
from unittest import mock

import pytest

from powernap.parallel import loopback


@pytest.fixture
def no_ipv4(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with mock.patch.object(socket.socket, "bind", side_effect=OSError):
        yield


def test_ranks_meet_on_127_0_0_1_where_there_is_one(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    loopback.prepare(2, 2)
    assert loopback.address() == "127.0.0.1" and "GLOO_SOCKET_IFNAME" not in os.environ


def test_and_on_ipv6s_loopback_where_there_is_none(no_ipv4):
    loopback.prepare(4, 2)  # two machines have another network between them
    assert loopback.address() == "::1" and "GLOO_SOCKET_IFNAME" not in os.environ
    loopback.prepare(2, 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
