"""The writer's end of a control connection: messages to and from the receiver, and news from the issuing thread."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from baton.errors import PeerClosed
from baton.spec import ProcessRef
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.sockets import Stream, WriterSocket, connect_to
from kvtransfer.transports.wire import agree


class Control(WriterSocket):
    """Used by one thread at a time, but for `news` and `shut_down`. The constructor connects, and raises as
    `Writer.connect` says."""

    def __init__(self, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        super().__init__(Stream(connect_to(endpoint, peer.name, deadline)), peer.name)
        self._lock = threading.Lock()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = True

    def shake_hands(self, block_bytes: int, incarnation: str, deadline: float) -> None:
        hello = wire.HELLO.pack(wire.MAGIC, wire.VERSION, block_bytes) + incarnation.encode()
        self.put(wire.frame(wire.NcclOp.HELLO, hello), deadline)
        while (message := self.message()) is None:
            self.wait_for_any(deadline)
        op, body = message
        if op is not wire.NcclOp.WELCOME or len(body) != wire.HELLO.size:
            raise PeerClosed(f"{self.name} is no receiver of ours")
        _magic, version, theirs = wire.HELLO.unpack(body)
        agree(("nccl version", wire.VERSION, version), ("block_bytes", block_bytes, theirs))

    def put(self, message: bytes, deadline: float) -> None:
        self.send([memoryview(message)], deadline)

    def message(self) -> tuple[wire.NcclOp, bytes] | None:
        """The next whole message, if one has come. Raises `PeerClosed` for malformed bytes."""
        try:
            return wire.take_frame(self.received)
        except wire.Malformed as error:
            raise PeerClosed(f"{self.name} sent {error}") from error

    def wait_for_any(self, deadline: float) -> None:
        """Until a message or news of the issuing thread comes."""
        self.wait(deadline, also=self._news)
        self._clear()

    def wait_for_news(self, seconds: float) -> None:
        """Until the issuing thread has news; works also when the connection has ended."""
        poller = select.poll()
        poller.register(self._news, select.POLLIN)
        poller.poll(seconds * 1000)
        self._clear()

    def news(self) -> None:
        """Ends a wait; from any thread, also after `close`."""
        with self._lock:
            if self._open:
                os.eventfd_write(self._news, 1)

    def close(self) -> None:
        """Idempotent."""
        super().close()
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._news)

    def _clear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)
