"""How the network transports open their sockets."""

from __future__ import annotations

import socket
import time

from kvtransfer.transports.sockets import LOCAL_SEND_BYTES, connect_to, listen_on


def test_a_writer_on_the_receivers_host_keeps_little_under_way() -> None:
    listener, endpoint = listen_on("127.0.0.1", 0, None)
    with listener, connect_to(endpoint, "receiver", time.monotonic() + 5) as connected:
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * LOCAL_SEND_BYTES  # as the kernel counts
