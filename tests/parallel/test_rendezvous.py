"""Ranks that have a name in common and no port."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from powernap.parallel import rendezvous
from powernap.parallel.rendezvous import drawn_ports


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "")


def test_ranks_meet_though_others_listen_on_the_first_ports(monkeypatch):
    """One that says nothing, and another job of ours."""
    monkeypatch.setattr(rendezvous, "ANSWERS_WITHIN", 0.2)
    first, second = drawn_ports("one")[:2]
    with (
        socket.create_server(("", first)),
        rendezvous._listener("one") as other,
        ThreadPoolExecutor() as threads,
    ):
        assert other.getsockname()[1] == second
        threads.submit(rendezvous._answer, other, "powernap another 7")
        asking = threads.submit(rendezvous._find_store, "one", 20)
        with rendezvous.rendezvous("one", 0, 20) as store:
            assert asking.result() == store.port == int(os.environ["MASTER_PORT"])
            other.shutdown(socket.SHUT_RDWR)


def test_rank_0_that_is_not_there_is_said():
    with pytest.raises(RuntimeError, match="rank 0 was not found on any of the ports"):
        rendezvous._find_store("nobody", 0.3)
