"""Rendezvous of ranks without an agreed port: srun gives them a common name, that of their step, but no channel.

The name seeds a list of ports. Rank 0 listens on the first free one and answers with the port of its store; the others
try the ports in the same order and recognise rank 0 by the name: a port may belong to another job or program.
"""

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from powernap.parallel import loopback

RENDEZVOUS = "POWERNAP_RENDEZVOUS"  # environment: the common name; MASTER_ADDR is rank 0's host
PORTS = range(10000, 32000)  # below the ephemeral ports
TRIES = 16
ANSWERS_WITHIN = 3.0  # seconds


@contextmanager
def rendezvous(name: str, rank: int, timeout_seconds: float) -> Iterator[dist.Store]:
    """The ranks' common store, which all must join inside; sets MASTER_PORT to its port.

    Raises:
        RuntimeError: if rank 0 finds no free port, or the others do not find rank 0 in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if rank == 0:
        store = dist.TCPStore(loopback.address(), 0, is_master=True, wait_for_workers=False, timeout=timeout)
        os.environ["MASTER_PORT"] = str(store.port)
        with _listener(name) as listener:
            threading.Thread(target=_answer, args=(listener, _greeting(name) + str(store.port)), daemon=True).start()
            yield store
    else:
        address, port = os.environ["MASTER_ADDR"], _find_store(name, timeout_seconds)
        os.environ["MASTER_PORT"] = str(port)
        yield dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def drawn_ports(name: str) -> list[int]:
    return random.Random(name).sample(PORTS, TRIES)


def _listener(name: str) -> socket.socket:
    for port in drawn_ports(name):
        with suppress(OSError):
            return socket.create_server(("", port), backlog=1024, reuse_port=False)
    raise RuntimeError(f"rank 0 finds none of the ports {drawn_ports(name)} free")


def _answer(listener: socket.socket, line: str) -> None:
    with suppress(OSError):  # closed: all have met
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(line.encode() + b"\n")


def _find_store(name: str, timeout_seconds: float) -> int:
    deadline = time.monotonic() + timeout_seconds
    last_error: OSError | UnicodeDecodeError | None = None
    while time.monotonic() < deadline:
        for port in drawn_ports(name):
            try:
                with socket.create_connection((os.environ["MASTER_ADDR"], port), ANSWERS_WITHIN) as connection:
                    answer = connection.makefile().readline(200).strip()
            except (OSError, UnicodeDecodeError) as error:
                last_error = error
                continue
            if answer.startswith(_greeting(name)):
                return int(answer.removeprefix(_greeting(name)))
        time.sleep(0.2)
    raise RuntimeError(
        f"rank 0 was not found on any of the ports {drawn_ports(name)}: {last_error or 'others answer there'}"
    )


def _greeting(name: str) -> str:
    return f"powernap {name} "
