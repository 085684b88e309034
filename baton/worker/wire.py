"""What two workers tell each other in the handshake, on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from baton.errors import Mismatch
from baton.identity import host_id
from baton.rpc.convert import process_to_wire
from baton.spec import ProcessRef
from baton.v1 import transfer_pb2
from baton.v1 import worker_pb2 as wire
from kvtransfer.blocks.layout import KvLayout

PROTOCOL_VERSION = 1


def layout_to_wire(layout: KvLayout) -> wire.KvLayout:
    return wire.KvLayout(**asdict(layout))


def layout_from_wire(message: wire.KvLayout) -> KvLayout:
    """Raises Mismatch where it is no layout at all."""
    try:
        return KvLayout(**{field.name: getattr(message, field.name) for field in wire.KvLayout.DESCRIPTOR.fields})
    except ValueError as error:
        raise Mismatch("kv_layout", "a valid layout", str(error)) from None


def handshake_of(
    process: ProcessRef,
    fingerprint: str,
    layout: KvLayout,
    transports: Iterable[str],
    *,
    checksums: bool = False,
    tcp_tls: bool = False,
) -> transfer_pb2.HandshakeRequest:
    """What a sender says first."""
    return transfer_pb2.HandshakeRequest(
        process=process_to_wire(process),
        version_min=PROTOCOL_VERSION,
        version_max=PROTOCOL_VERSION,
        fingerprint=fingerprint,
        kv_layout=layout_to_wire(layout),
        transports=transports,
        host=host_id(),
        checksums=checksums,
        tcp_tls=tcp_tls,
    )
