"""How the network transports open their sockets."""

from __future__ import annotations

import socket
import time

import pytest

from baton.errors import PeerClosed
from kvtransfer.transports.sockets import LOCAL_SEND_BYTES, connect_to, listen_on


@pytest.mark.parametrize("wildcard", ["::", "0.0.0.0"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_wildcard_takes_both_families(wildcard: str, host: str) -> None:
    """As with gRPC: `--listen` names one host for both."""
    if not six():
        pytest.skip("this machine has no IPv6")
    listener, endpoint = listen_on(wildcard, 0, host)
    with listener, connect_to(endpoint, "receiver", time.monotonic() + 5) as connected:
        assert connected.getpeername()[0] == host
        accepted(listener)


def test_one_address_is_not_widened() -> None:
    listener, _ = listen_on("127.0.0.1", 0, None)
    with listener:
        assert listener.family == socket.AF_INET
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("endpoint", ["nowhere", "127.0.0.1:99999", "127.0.0.1:x", "127.0.0.1:1#xyz", "a" * 70 + ":1"])
def test_what_is_no_endpoint_is_refused_in_one_way(endpoint: str) -> None:
    with pytest.raises(PeerClosed):
        connect_to(endpoint, "receiver", time.monotonic() + 5)


def six() -> bool:
    """Whether ::1 can be bound."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def accepted(listener: socket.socket) -> None:
    listener.settimeout(5)
    listener.accept()[0].close()


def test_a_writer_on_the_receivers_host_keeps_little_under_way() -> None:
    listener, endpoint = listen_on("127.0.0.1", 0, None)
    with listener, connect_to(endpoint, "receiver", time.monotonic() + 5) as connected:
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * LOCAL_SEND_BYTES  # as the kernel counts
