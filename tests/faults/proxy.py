"""A wire between two processes that a test can delay, stall, change and cut: real sockets, forwarded in user space."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

PIECE = 64 * 1024
QUEUED_PIECES = 16


class Proxy:
    """Forwards connections to `target` (HOST:PORT). What a test sets holds from the next piece of bytes on.

    `delay_s`: each way. `flowing`: cleared, nothing passes. `hold_after`: after so many bytes from clients, over all
    connections, the connection that brought the next one is held until `release`; `held` says that it came to that.
    `change(offset, data)` may return other bytes of the same length; `offset` counts as `hold_after` does.
    """

    def __init__(self, target: str) -> None:
        self.target, _, self._token = target.partition("#")
        self.address = ""
        self.delay_s = 0.0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.hold_after: int | None = None
        self.held = asyncio.Event()
        self._released = asyncio.Event()
        self.change: Callable[[int, bytes], bytes] | None = None
        self.carried = 0
        """Bytes that came from clients."""
        self._server: asyncio.Server | None = None
        self._wires: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """The address that stands for the target."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}" + (f"#{self._token}" if self._token else "")
        return self.address

    async def stop(self) -> None:
        """Cuts everything."""
        if self._server is not None:
            self._server.close()
            self.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.wait_closed()

    async def cut_within(self, size: int, seconds: float) -> bool:
        """Resets all connections in the middle of the next `size` bytes; False when they don't come in time."""
        self._released.clear()
        self.held.clear()
        self.hold_after = self.carried + size // 2
        try:
            async with asyncio.timeout(seconds):
                await self.held.wait()
        except TimeoutError:
            self.hold_after = None
            return False
        self.cut()
        return True

    async def stall(self, seconds: float) -> None:
        """For a while nothing passes."""
        self.flowing.clear()
        await asyncio.sleep(seconds)
        self.flowing.set()

    def cut(self) -> None:
        """Resets all connections; new ones may come."""
        for wire in list(self._wires):
            _reset(wire)

    def release(self) -> None:
        """What was held passes."""
        self._released.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=PIECE)
        wires = {writer, far_writer}
        self._wires |= wires
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, True))
                group.create_task(self._pump(far_reader, writer, False))
        except* OSError:
            pass  # one side broke its connection: what a test wanted, or its end
        finally:
            self._wires -= wires
            for wire in wires:
                _reset(wire)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, from_client: bool) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_PIECES)
        loop = asyncio.get_running_loop()

        async def take() -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(PIECE):
                    await pieces.put((loop.time() + self.delay_s, data))
            await pieces.put((loop.time() + self.delay_s, b""))

        taking = asyncio.create_task(take())
        try:
            while True:
                due, data = await pieces.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self.flowing.wait()
                if not data:
                    raise ConnectionResetError("one end has left")
                await self._forward(data, sink, from_client)
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _forward(self, data: bytes, sink: asyncio.StreamWriter, from_client: bool) -> None:
        if from_client:
            offset, self.carried = self.carried, self.carried + len(data)
            if self.change is not None:
                data = self.change(offset, data)
            if self.hold_after is not None and self.carried > self.hold_after:
                allowed = max(0, self.hold_after - offset)
                sink.write(data[:allowed])
                await sink.drain()
                data = data[allowed:]
                self.hold_after = None
                self.held.set()
                await self._released.wait()
        sink.write(data)
        await sink.drain()


def _reset(wire: asyncio.StreamWriter) -> None:
    """The peer gets a reset, not an orderly end."""
    raw = wire.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.transport.abort()
