"""Where processes of this machine meet. Nothing here imports torch."""

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
    """Have gloo use loopback where all ranks are here and there is no 127.0.0.1, to which it turns by itself."""
    if world_size == local_world_size and address() == "::1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
