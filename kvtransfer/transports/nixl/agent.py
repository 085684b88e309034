"""The seam over the NIXL library: an agent with one registered pool, and no writes after its end.

NIXL writes one-sidedly over UCX. Most of UCX's ways end with the agent that they lead to: a network adapter refuses
writes to memory that is not registered any more, and over sockets or a shared queue the agent's own thread places the
bytes. Three do not (cma, knem, xpmem): there the writer's kernel writes into this process at any time. So no agent of
ours offers them; a peer can use only ways that both offer.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Final

from baton.errors import BatonError, ConfigError, PeerClosed
from kvtransfer.blocks.memory import PoolMemory

FORBIDDEN: Final = ("cma", "knem", "xpmem")
ALIASES: Final = ("all", "shm", "sm")
"""UCX's names for sets that have a forbidden one in them."""
PAUSE_S: Final = 20e-6

_Spans = Sequence[tuple[int, int, int]]


def available() -> bool:
    return importlib.util.find_spec("nixl") is not None


def require() -> None:
    """Restricts the library. Raises `ConfigError` where the package is missing, or the environment asks for ways of UCX
    that could not be stopped."""
    if not available():
        raise ConfigError("transport: nixl needs the package of that name: install baton[nixl]")
    restrict(os.environ)


def restrict(environment: dict[str, str] | os._Environ[str]) -> None:
    """Make UCX offer only ways that end with their agent; before the first agent. Raises `ConfigError` where the
    environment asks for others."""
    asked = environment.setdefault("UCX_TLS", "^" + ",".join(FORBIDDEN))
    names = asked.removeprefix("^").split(",")
    if asked.startswith("^"):
        wrong = [name for name in FORBIDDEN if name not in names]
    else:
        wrong = [name for name in names if name in (*FORBIDDEN, *ALIASES)]
    if wrong:
        raise ConfigError(
            f"UCX_TLS: {asked!r} allows {', '.join(wrong)}: a peer's writes could not be stopped; "
            f"leave it unset, or name what to use, as in tcp or rc,ud"
        )


@cache
def _library() -> Any:
    """The package's interface. Its log, which would go to stdout, goes where ours does."""
    from nixl import _api as nixl

    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return nixl


class NixlAgent:
    """One end of one pair. One thread at a time uses it.

    Bytes of a peer are placed within `notices` only, ours leave within `write`. After `close`, which is idempotent, no
    peer can reach the pool through this agent: its memory is not registered any more, its connections are gone, and
    nothing asks it for progress.
    """

    def __init__(self, name: str, memory: PoolMemory) -> None:
        nixl = _library()
        self._agent: Any = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._memory = memory
        self._registered = self._agent.register_memory([(memory.address, memory.bytes, 0, "")], "DRAM")
        self._peer = ""
        self._write: Any = None

    @property
    def metadata(self) -> bytes:
        """A peer needs it to reach this agent."""
        return bytes(self._agent.get_agent_metadata())

    def know(self, metadata: bytes) -> None:
        """The one peer that `write` writes to. Raises `PeerClosed` for metadata that NIXL does not take."""
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise PeerClosed(f"NIXL: {error}") from error
        self._peer = name.decode() if isinstance(name, bytes) else name

    def write(self, sources: _Spans, targets: _Spans, notice: bytes, check: Callable[[], None]) -> None:
        """Write spans (address, bytes, 0) of our pool to the peer's, which gets `notice` once all are there.

        `check` is called while it lasts, and raises to end it. Raises `PeerClosed` where NIXL gives up. After either,
        only `close` ends the write for sure.
        """
        try:
            local, remote = (self._agent.get_xfer_descs(list(spans), "DRAM") for spans in (sources, targets))
            self._write = self._agent.initialize_xfer("WRITE", local, remote, self._peer, notice)
            state = self._agent.transfer(self._write)
            while state == "PROC":
                check()
                time.sleep(PAUSE_S)  # others of this process want the interpreter
                state = self._agent.check_xfer_state(self._write)
            self._write.release()
        except BatonError:
            raise
        except Exception as error:
            raise PeerClosed(f"NIXL: {error}") from error
        if state != "DONE":
            raise PeerClosed(f"NIXL: the write ended as {state}")

    def notices(self) -> list[bytes]:
        """Place the bytes that have come, and return the notices of the writes that are now whole."""
        return [notice for notices in self._agent.get_new_notifs().values() for notice in notices]

    def close(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            write, self._write = self._write, None
            if write is not None:
                with suppress(Exception):  # one that can't be cancelled ends with the agent
                    write.release()
            del write
            if self._peer:
                agent.remove_remote_agent(self._peer)
            agent.deregister_memory(self._registered)
            del agent  # the last reference: its connections and queues go with it
