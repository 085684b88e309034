"""The KV layout on the wire. (It can't live in `baton.rpc`, which is below `kvtransfer`.)"""

from __future__ import annotations

from baton.errors import Mismatch
from baton.v1 import worker_pb2 as wire
from kvtransfer.blocks.layout import KvLayout


def layout_to_wire(layout: KvLayout) -> wire.KvLayout:
    """See `KvLayout`."""
    return wire.KvLayout(
        version=layout.version,
        block_tokens=layout.block_tokens,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        rank=layout.rank,
        ranks=layout.ranks,
    )


def layout_from_wire(message: wire.KvLayout) -> KvLayout:
    """Raises Mismatch where it is no layout at all."""
    try:
        return KvLayout(
            layers=message.layers,
            kv_heads=message.kv_heads,
            head_dim=message.head_dim,
            dtype=message.dtype,
            block_tokens=message.block_tokens,
            version=message.version,
            rank=message.rank,
            ranks=message.ranks,
        )
    except ValueError as error:
        raise Mismatch("kv_layout", "a valid layout", str(error)) from None
