"""Where ranks meet that nobody gave a port: srun starts them with a common name of their step, and no channel between them.

The name draws a list of ports. Rank 0 listens on the first that is free, and tells who asks there where its store is; the
others ask in the same order, and know rank 0 by the name: a port may belong to another job, or to another program.
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

RENDEZVOUS = "POWERNAP_RENDEZVOUS"  # environment: the common name; MASTER_ADDR says where rank 0 is
PORTS = range(10000, 32000)  # below those that systems give to whoever asks for any
TRIES = 16
ANSWERS_WITHIN = 3.0  # seconds


@contextmanager
def rendezvous(name: str, rank: int, timeout_seconds: float) -> Iterator[dist.Store]:
    """The ranks' common store, for all of them to join inside; MASTER_PORT says its port from now on.

    Raises:
        RuntimeError: if rank 0 finds no free port, or the others do not find rank 0 in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if rank == 0:
        store = dist.TCPStore(loopback.address(), 0, is_master=True, wait_for_workers=False, timeout=timeout)
        os.environ["MASTER_PORT"] = str(store.port)
        with _listener(name) as listener:
            threading.Thread(target=_tell, args=(listener, _line(name) + str(store.port)), daemon=True).start()
            yield store
    else:
        address, port = os.environ["MASTER_ADDR"], _ask(name, timeout_seconds)
        os.environ["MASTER_PORT"] = str(port)
        yield dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def drawn_ports(name: str) -> list[int]:
    return random.Random(name).sample(PORTS, TRIES)


def _listener(name: str) -> socket.socket:
    for port in drawn_ports(name):
        with suppress(OSError):
            return socket.create_server(("", port), backlog=1024, reuse_port=False)
    raise RuntimeError(f"rank 0 finds none of the ports {drawn_ports(name)} free")


def _tell(listener: socket.socket, line: str) -> None:
    with suppress(OSError):  # closed: all have met
        while True:
            asking, _ = listener.accept()
            with asking, suppress(OSError):
                asking.sendall(line.encode() + b"\n")


def _ask(name: str, timeout_seconds: float) -> int:
    deadline = time.monotonic() + timeout_seconds
    last: OSError | UnicodeDecodeError | None = None
    while time.monotonic() < deadline:
        for port in drawn_ports(name):
            try:
                with socket.create_connection((os.environ["MASTER_ADDR"], port), ANSWERS_WITHIN) as connection:
                    said = connection.makefile().readline(200).strip()
            except (OSError, UnicodeDecodeError) as error:
                last = error
                continue
            if said.startswith(_line(name)):
                return int(said.removeprefix(_line(name)))
        time.sleep(0.2)
    raise RuntimeError(f"rank 0 was not found on any of the ports {drawn_ports(name)}: {last or 'others answer there'}")


def _line(name: str) -> str:
    return f"powernap {name} "
