"""No network in the tests: a connection or a look-up that leaves the machine is an error, whoever asks.

Processes that a test starts are told to stay offline by the environment; this process is stopped by an audit hook,
which also sees what libraries do. ``pytest --online`` leaves both out.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

EVENTS = frozenset(
    {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


class NetworkError(AssertionError):
    """A test asked for the network."""


def go_offline() -> None:
    """From now on, until this process ends: an audit hook cannot be taken off."""
    os.environ.update(OFFLINE)
    own = {"", "localhost", socket.gethostname()}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        asked = arguments[0] if event.startswith("socket.get") else arguments[1]
        host = asked[0] if isinstance(asked, tuple) else asked
        is_address = isinstance(asked, tuple) or event.startswith("socket.get")
        if is_address and host is not None and not _is_here(host, own):
            raise NetworkError(f"a test may not use the network: {event} {host!r}")

    sys.addaudithook(hook)


def _is_here(host: Any, own: set[str]) -> bool:
    """Whether a host is this machine."""
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in own:
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False
