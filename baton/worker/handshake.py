"""What a sender says first to a receiver."""

from __future__ import annotations

from collections.abc import Iterable

from baton.identity import host_id
from baton.model import KvLayout
from baton.rpc.convert import layout_to_wire, process_to_wire
from baton.rpc.greeting import with_versions
from baton.spec import ProcessRef
from baton.v1 import transfer_pb2


def handshake_of(
    process: ProcessRef,
    fingerprint: str,
    layout: KvLayout,
    transports: Iterable[str],
    *,
    checksums: bool = False,
    tcp_tls: bool = False,
) -> transfer_pb2.HandshakeRequest:
    message = transfer_pb2.HandshakeRequest(
        process=process_to_wire(process),
        fingerprint=fingerprint,
        kv_layout=layout_to_wire(layout),
        transports=transports,
        host=host_id(),
        checksums=checksums,
        tcp_tls=tcp_tls,
    )
    return with_versions(message)
