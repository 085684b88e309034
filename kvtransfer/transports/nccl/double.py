"""The double: NCCL's semantics over host memory and unix sockets, between threads or between real processes.

It keeps the traits that make NCCL hard to use, so that all logic above it is tested without a GPU: an initialisation
that waits for the other rank, sends that wait for their receives, groups that end as one, a peer whose death is not
noticed, and calls that must not be made from two threads at once.
"""

from __future__ import annotations

import ctypes
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from kvtransfer.transports.nccl.seam import RECEIVER, UNIQUE_ID_BYTES, CommunicatorError, Span

TURN_SECONDS = 0.01  # within which an abort is noticed
HEADER = struct.Struct("<I")
SIZE = struct.Struct("<Q")


@dataclass(slots=True)
class DoubleFaults:
    """How one device misbehaves; may be changed at any time.

    `fail_next`: the next group moves its first half and then fails asynchronously, with this text. `flowing`: cleared,
    groups make no progress. `draining`: cleared, streams do not run dry after an abort.
    """

    fail_next: str = ""
    flowing: threading.Event = field(default_factory=threading.Event)
    draining: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.flowing.set()
        self.draining.set()


class DoubleDevice:
    """Implements `Device`. A fence is a `threading.Event`, or None."""

    def __init__(self) -> None:
        self.minted = 0
        self.opened = 0
        self.faults = DoubleFaults()

    def mint(self) -> bytes:
        self.minted += 1
        return f"baton-nccl-{secrets.token_hex(16)}".encode().ljust(UNIQUE_ID_BYTES, b".")

    def open(self, unique_id: bytes, rank: int) -> DoubleCommunicator:
        self.opened += 1
        return DoubleCommunicator(unique_id, rank, self.faults)


class _Aborted(Exception):
    pass


class DoubleCommunicator:
    """Implements `Communicator`. Its thread stands for the device's stream."""

    def __init__(self, unique_id: bytes, rank: int, faults: DoubleFaults) -> None:
        self._name = "\0" + unique_id.decode().rstrip(".")
        self._rank = rank
        self._faults = faults
        self._inside = threading.Lock()
        self._groups: queue.SimpleQueue[tuple[Sequence[Span], threading.Event | None]] = queue.SimpleQueue()
        self._ended = threading.Event()  # the initialisation, or the last group
        self._aborted = threading.Event()
        self._error = ""
        self._socket: socket.socket | None = None
        self._stream = threading.Thread(target=self._run, name="nccl-double", daemon=True)
        self._stream.start()

    def post(self, group: Sequence[Span], fence: object | None) -> None:
        assert fence is None or isinstance(fence, threading.Event)
        with self._alone():
            self._check()
            if not self._ended.is_set():
                raise CommunicatorError("invalid usage: a group while another one is under way")
            self._ended.clear()
            self._groups.put((group, fence))

    def poll(self) -> bool:
        with self._alone():
            self._check()
            return self._ended.is_set()

    def abort(self) -> None:
        with self._alone():
            assert not self._aborted.is_set(), "aborted twice"
            self._aborted.set()

    def drained(self) -> bool:
        with self._alone():
            assert self._aborted.is_set(), "not aborted"
            if self._stream.is_alive() or not self._faults.draining.is_set():
                return False
            self._stream.join()
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Real NCCL would be undefined here."""
        assert self._inside.acquire(blocking=False), "two threads inside one communicator"
        try:
            yield
        finally:
            self._inside.release()

    def _check(self) -> None:
        assert not self._aborted.is_set(), "used after its abort"
        if self._error:
            raise CommunicatorError(self._error)

    # -- the stream's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(_Aborted):
            try:
                self._meet()
                while True:
                    self._ended.set()
                    group, fence = self._next()
                    self._wait(fence)
                    (self._receive if self._rank == RECEIVER else self._send)(group)
            except OSError:
                self._hang()  # the death of the peer is not noticed
        if self._socket is not None:
            self._socket.close()

    def _meet(self) -> None:
        """Wait for the other rank: the receiver listens under the unique id's name, the sender looks for it."""
        if self._rank == RECEIVER:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.settimeout(TURN_SECONDS)
                listener.bind(self._name)
                listener.listen(1)
                while self._socket is None:
                    self._turn()
                    with suppress(TimeoutError):
                        self._socket = listener.accept()[0]
        while self._socket is None:
            self._turn()
            trial = socket.socket(socket.AF_UNIX)
            try:
                trial.connect(self._name)
                self._socket = trial
            except ConnectionRefusedError:
                trial.close()
                self._aborted.wait(TURN_SECONDS / 10)
        self._socket.settimeout(TURN_SECONDS)

    def _next(self) -> tuple[Sequence[Span], threading.Event | None]:
        while True:
            self._turn()
            with suppress(queue.Empty):
                return self._groups.get(timeout=TURN_SECONDS)

    def _receive(self, group: Sequence[Span]) -> None:
        """Tell the sender the sizes that are posted here, and take the bytes."""
        sizes = b"".join(SIZE.pack(span.bytes) for span in group)
        self._put(memoryview(HEADER.pack(len(group)) + sizes))
        for number, span in enumerate(group):
            self._stumble(number, group)
            self._fill(_view(span))

    def _send(self, group: Sequence[Span]) -> None:
        """Wait until the receives are posted. Ones that do not match are never met: nothing moves."""
        head = bytearray(HEADER.size)
        self._fill(memoryview(head))
        sizes = bytearray(HEADER.unpack(head)[0] * SIZE.size)
        self._fill(memoryview(sizes))
        if [size for (size,) in SIZE.iter_unpack(sizes)] != [span.bytes for span in group]:
            self._hang()
        for number, span in enumerate(group):
            self._stumble(number, group)
            self._put(_view(span))

    def _stumble(self, number: int, group: Sequence[Span]) -> None:
        if self._faults.fail_next and number >= len(group) // 2:
            self._error, self._faults.fail_next = self._faults.fail_next, ""
            self._hang()
        self._wait(self._faults.flowing)

    def _fill(self, view: memoryview) -> None:
        assert self._socket is not None
        while view:
            self._turn()
            with suppress(TimeoutError):
                count = self._socket.recv_into(view)
                if count == 0:
                    self._hang()
                view = view[count:]

    def _put(self, view: memoryview) -> None:
        assert self._socket is not None
        while view:
            self._turn()
            with suppress(TimeoutError):
                view = view[self._socket.send(view) :]

    def _wait(self, event: threading.Event | None) -> None:
        while event is not None and not event.wait(TURN_SECONDS):
            self._turn()

    def _hang(self) -> None:
        self._aborted.wait()
        raise _Aborted

    def _turn(self) -> None:
        if self._aborted.is_set():
            raise _Aborted


def _view(span: Span) -> memoryview:
    return memoryview((ctypes.c_char * span.bytes).from_address(span.address)).cast("B")
