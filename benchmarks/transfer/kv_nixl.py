"""NIXL as a way to move blocks, for `make bench-kv`: one WRITE of all descriptors, prepared before the clock starts.

`block`: a block is one span of all layers, as ours. `layer`: a tensor for each layer's keys and one for its values, as
serving engines usually have them, so a block is 60 spans. Both ends poll while a transfer is under way, so that neither
waits for a wake-up, and only then: NIXL's own progress threads never rest, and the other ways need the cores too.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

from benchmarks.transfer.kv_ends import LAYOUT, LIMIT_S, POOL_BLOCKS, plan

SHARE = LAYOUT.kv_heads * LAYOUT.share_bytes


class _Memory:
    def __init__(self, agent: nixl_agent, kind: str) -> None:
        self.shape = kind.split()[-1]
        self.pool = np.ones(POOL_BLOCKS * LAYOUT.block_bytes, np.uint8)
        self.base = self.pool.ctypes.data
        agent.register_memory([(self.base, self.pool.nbytes, 0, "kv")], "DRAM")

    def spans(self, base: int, blocks: list[int]) -> list[tuple[int, int, int]]:
        """(address, bytes, device) in the pool at `base`."""
        if self.shape == "block":
            return [(base + block * LAYOUT.block_bytes, LAYOUT.block_bytes, 0) for block in blocks]
        tensor = POOL_BLOCKS * SHARE
        return [(base + t * tensor + block * SHARE, SHARE, 0) for t in range(2 * LAYOUT.layers) for block in blocks]


def _agent(name: str) -> nixl_agent:
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


class NixlTarget:
    """The receiving side; its thread does what a receiver's progress thread has to."""

    def __init__(self, kind: str) -> None:
        self._agent = _agent(f"target {kind}")
        self._memory = _Memory(self._agent, kind)
        self._polling, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    @property
    def metadata(self) -> tuple[bytes, int]:
        return self._agent.get_agent_metadata(), self._memory.base

    def poll(self, on: bool) -> None:
        """Whether to poll from now on."""
        (self._polling.set if on else self._polling.clear)()

    def _poll(self) -> None:
        while self._polling.wait() and not self._ended:
            self._agent.get_new_notifs()

    def close(self) -> None:
        self._ended = True
        self._polling.set()
        self._thread.join(LIMIT_S)


class NixlInitiator:
    """The sending side."""

    def __init__(self, kind: str, target: tuple[bytes, int]) -> None:
        metadata, base = target
        self._agent = _agent(f"initiator {kind}")
        self._memory = _Memory(self._agent, kind)
        self._peer = self._agent.add_remote_agent(metadata)
        if isinstance(self._peer, bytes):
            self._peer = self._peer.decode()
        self._base = base
        self._prepared: dict[int, Any] = {}

    def run(self, blocks: int) -> float:
        handle = self._prepared.get(blocks)
        if handle is None:
            sources, destinations = (some[:blocks] for some in plan())
            local = self._agent.get_xfer_descs(self._memory.spans(self._memory.base, sources), "DRAM")
            remote = self._agent.get_xfer_descs(self._memory.spans(self._base, destinations), "DRAM")
            handle = self._prepared[blocks] = self._agent.initialize_xfer("WRITE", local, remote, self._peer, b"kv")
        started = time.perf_counter()
        state = self._agent.transfer(handle)
        while state == "PROC" and time.perf_counter() - started < LIMIT_S:
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - started
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return seconds

    def close(self) -> None:
        for handle in self._prepared.values():
            self._agent.release_xfer_handle(handle)
