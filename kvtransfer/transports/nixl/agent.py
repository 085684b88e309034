"""The NIXL library as the transport needs it: an agent with one registered pool, and nothing that writes behind it.

NIXL writes one-sidedly over UCX. Most of UCX's ways end with the agent that they lead to: a network adapter refuses
what comes for memory that is not registered any more, and over sockets or a shared queue the agent's own thread places
the bytes. Three do not (cma, knem, xpmem): there the writer's kernel writes into this process, whether it still wants
that or not. So no agent of ours may offer them; a peer can use only what both offer.
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
    """Whether the package is installed."""
    return importlib.util.find_spec("nixl") is not None


def restrict(environment: dict[str, str] | os._Environ[str]) -> None:
    """Sees to it that UCX offers nothing that can't be taken back. Before the first agent.

    Raises `ConfigError` where the environment asks for just that.
    """
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
    """The package's interface. Its log goes where ours does: stdout, which it would take, belongs to our user."""
    from nixl import _api as nixl

    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return nixl


class NixlAgent:
    """One end of one pair. One thread at a time uses it.

    Nothing moves unless somebody calls: bytes of a peer are placed within `notices`, ours leave within `write`. After
    `close` no peer can reach the pool through this agent: its memory is not registered any more, its connections are
    gone, and nobody asks it for progress.
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
        """What a peer needs to reach this agent."""
        return bytes(self._agent.get_agent_metadata())

    def know(self, metadata: bytes) -> None:
        """The one peer that `write` writes to. Raises `PeerClosed` where it makes no sense of it."""
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise PeerClosed(f"NIXL: {error}") from error
        self._peer = name.decode() if isinstance(name, bytes) else name

    def write(self, sources: _Spans, targets: _Spans, notice: bytes, check: Callable[[], None]) -> None:
        """Writes spans (address, bytes, 0) of our pool to the peer's, and gives it `notice` once all are there.

        `check` is called while it lasts, and raises to end it. Raises `PeerClosed` where NIXL gives up. After either,
        only `close` ends what may still be under way.
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
        """Places what peers have written, and returns the notices of the writes that are now whole."""
        return [notice for notices in self._agent.get_new_notifs().values() for notice in notices]

    def close(self) -> None:
        """Idempotent."""
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
