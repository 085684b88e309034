"""What the kernel knows of a connection."""

from __future__ import annotations

import socket
import struct

DATA_SEGS_OUT = 156
"""Where `tcpi_data_segs_out` is in `struct tcp_info` (linux/tcp.h)."""


def segments_sent(connected: socket.socket) -> int:
    """Segments with data that have been sent on a TCP connection."""
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGS_OUT + 4)
    (sent,) = struct.unpack_from("I", info, DATA_SEGS_OUT)
    return int(sent)
