"""The address where processes of this machine meet. Nothing here imports torch."""

import os
import socket


def address() -> str:
    """127.0.0.1, or ::1 on a machine without IPv4."""
    with socket.socket(socket.AF_INET) as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError:
            return "::1"
    return "127.0.0.1"


def prepare(world_size: int, local_world_size: int) -> None:
    """Make gloo use loopback if all ranks are on this machine and it has no 127.0.0.1, gloo's own choice."""
    if world_size == local_world_size and address() == "::1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
