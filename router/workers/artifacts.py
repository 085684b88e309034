"""Fetches the large files of a model card from a worker, by checksum, and keeps the recent ones."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import grpc

from baton.errors import Mismatch, ResourceExhausted, Unavailable
from baton.rpc import net
from baton.rpc.awake import patience
from baton.rpc.status import from_rpc_error
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import WorkerStub

FETCH_S = 20.0
ARTIFACT_LIMIT_BYTES = 64 * 1024 * 1024
CACHE_LIMIT_BYTES = 32 * 1024 * 1024


class ArtifactStore:
    """Artifacts by SHA-256 (hexadecimal); drops the least recently used first."""

    def __init__(self, limit_bytes: int = CACHE_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    async def get(self, sha256: str, worker: ProcessRef) -> bytes:
        """From the cache, or from the worker. Raises Mismatch for bytes with another digest or where another process
        answers, ResourceExhausted for too many bytes, and Unavailable when they did not come in time."""
        if sha256 in self._kept:
            self._kept.move_to_end(sha256)
            return self._kept[sha256]
        data = await _fetch(sha256, worker)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            text = f"an artifact from {worker.address} has SHA-256 {found}, not {sha256}"
            raise Mismatch("sha256", sha256, found, text)
        self._kept[sha256] = data
        while sum(map(len, self._kept.values())) > self._limit and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return data


async def _fetch(sha256: str, worker: ProcessRef) -> bytes:
    data, address = bytearray(), worker.address
    request = wire.FetchArtifactRequest(sha256=sha256, receiver=worker.incarnation)
    try:
        async with patience(FETCH_S), net.open_channel(address) as channel:
            async for piece in WorkerStub(channel).FetchArtifact(request):
                data += piece.data
                if len(data) > ARTIFACT_LIMIT_BYTES:
                    raise ResourceExhausted(f"an artifact from {address} exceeds {ARTIFACT_LIMIT_BYTES} bytes")
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    except TimeoutError:
        raise Unavailable(f"an artifact from {address} did not come within {FETCH_S:g} s") from None
    return bytes(data)
