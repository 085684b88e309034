"""The writer's end of a control connection: messages to and from the receiver, and news from the issuing thread."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress

from baton.errors import DeadlineExceeded, Mismatch, PeerClosed
from baton.spec import ProcessRef
from kvtransfer.transports.nccl import wire

READ_BYTES = 4096


class Control:
    """Used by one thread at a time, but for `news` and `shut_down`. The constructor connects, and raises as
    `Transport.connect` says."""

    def __init__(self, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        self._peer = peer
        self._received = bytearray()
        self._shut = False
        self._lock = threading.Lock()
        self._socket = self._connect(endpoint, deadline)
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = True

    def shake_hands(self, block_bytes: int, incarnation: str, deadline: float) -> None:
        hello = wire.HELLO.pack(wire.MAGIC, wire.VERSION, block_bytes) + incarnation.encode()
        self.send(wire.frame(wire.Op.HELLO, hello), deadline)
        while (message := self.message()) is None:
            self.wait(deadline)
        op, body = message
        if op is not wire.Op.WELCOME or len(body) != wire.HELLO.size:
            raise PeerClosed(f"{self._peer.name} is no receiver of ours")
        _magic, version, theirs = wire.HELLO.unpack(body)
        if version != wire.VERSION:
            raise Mismatch("nccl version", str(wire.VERSION), str(version))
        if theirs != block_bytes:
            raise Mismatch("block_bytes", str(block_bytes), str(theirs))

    def send(self, data: bytes, deadline: float) -> None:
        """Raises `PeerClosed` or `DeadlineExceeded`. Reads nothing meanwhile: a receiver never waits for its reader."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                poller = select.poll()
                poller.register(self._socket, select.POLLOUT)
                if not poller.poll(self.left(deadline) * 1000):
                    raise DeadlineExceeded(self.late) from None
            except OSError as error:
                raise PeerClosed(f"{self._peer.name}: {error}") from error

    def message(self) -> tuple[wire.Op, bytes] | None:
        """The next one that has come whole. Raises `PeerClosed` for what is none."""
        try:
            return wire.take_frame(self._received)
        except wire.Malformed as error:
            raise PeerClosed(f"{self._peer.name} sent {error}") from error

    def wait(self, deadline: float) -> None:
        """Until something came, from the receiver or from the issuing thread. Raises `PeerClosed`, also after
        `shut_down`, or `DeadlineExceeded`."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._news, select.POLLIN)
        ready = dict(poller.poll(self.left(deadline) * 1000))
        if self._shut:
            raise PeerClosed("the channel is closed")
        if not ready:
            raise DeadlineExceeded(self.late)
        if self._news in ready:
            self._clear()
        if self._socket.fileno() in ready:
            self._receive()

    def wait_for_news(self, seconds: float) -> None:
        """Of the issuing thread alone, whatever has become of the receiver."""
        poller = select.poll()
        poller.register(self._news, select.POLLIN)
        poller.poll(seconds * 1000)
        self._clear()

    def news(self) -> None:
        """Ends a wait; from any thread, also after `close`."""
        with self._lock:
            if self._open:
                os.eventfd_write(self._news, 1)

    def shut_down(self) -> None:
        """Ends a wait and the connection; from any thread, also after `close`."""
        self._shut = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.news()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._news)

    def left(self, deadline: float) -> float:
        """Seconds until then. Raises `DeadlineExceeded` when there are none."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(self.late)
        return left

    @property
    def late(self) -> str:
        return f"the write to {self._peer.name} did not end in time"

    def _connect(self, endpoint: str, deadline: float) -> socket.socket:
        host, _, port = endpoint.rpartition(":")
        try:
            connected = socket.create_connection((host.strip("[]"), int(port)), timeout=self.left(deadline))
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._peer.name} did not answer at {endpoint}") from error
        except OSError as error:
            raise PeerClosed(f"{self._peer.name} at {endpoint}: {error}") from error
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setblocking(False)
        return connected

    def _receive(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerClosed(f"{self._peer.name}: {error}") from error
        if not data:
            raise PeerClosed(f"{self._peer.name} closed the connection")
        self._received += data

    def _clear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)
