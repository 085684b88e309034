"""One thread that waits on all descriptors of a transport: no thread for each peer."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from kvtransfer.handoffs.leases import LeaseTable

log = logging.getLogger(__name__)

JOIN_SECONDS = 30.0
ACCEPT_PAUSE_SECONDS = 0.5


class Reactor:
    """Calls back on readiness and on deadlines. `call`, `listen`, `close` may come from any thread, the rest from
    callbacks only.

    A callback that raises has met a fault of ours: it is logged and its descriptor is no longer watched.
    """

    def __init__(self, name: str) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, tuple[Callable[[int], None], Callable[[], None] | None]] = {}
        self._deadlines: LeaseTable[int] = LeaseTable()
        self._calls: deque[Callable[[], None]] = deque()
        self._polls: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> bool:
        """Run `function` on the reactor's thread, after earlier calls. Once closed: never, and False."""
        with self._lock:
            if self._closing:
                return False
            self._calls.append(function)
            os.eventfd_write(self._wake, 1)
        return True

    def close(self, last: Callable[[], None]) -> None:
        """Run the calls that are queued, then `last`, and end the thread. Idempotent; not from a callback."""
        assert threading.current_thread() is not self._thread, "the reactor can't wait for itself"
        with self._lock:
            if not self._closing:
                self._closing = True
                self._calls.append(last)
                os.eventfd_write(self._wake, 1)
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "a transport's callback blocks"

    def watch(self, fd: int, ready: Callable[[int], None], late: Callable[[], None] | None = None) -> None:
        """Call `ready(epoll events)` while `fd` is ready, and `late` when a deadline that `limit` set passes."""
        self._watched[fd] = (ready, late)
        self._epoll.register(fd, select.EPOLLIN)

    def listen(self, listener: socket.socket, accepted: Callable[[socket.socket], None]) -> None:
        """Accept on a non-blocking listener from now on; each connection is non-blocking and belongs to `accepted`.
        Out of descriptors, it pauses instead of spinning. May be called from any thread."""
        fd = listener.fileno()

        def ready(_events: int) -> None:
            try:
                peer, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.warning("can't accept: %s; trying again in %g s", error, ACCEPT_PAUSE_SECONDS)
                    self._epoll.modify(fd, 0)
                    self.limit(fd, ACCEPT_PAUSE_SECONDS)
                return  # otherwise the peer has left again
            peer.setblocking(False)
            accepted(peer)

        self.call(partial(self.watch, fd, ready, partial(self._epoll.modify, fd, select.EPOLLIN)))

    def poll(self, fd: int, function: Callable[[], None] | None) -> None:
        """Call `function` over and over, without waiting, until None or `forget` takes its place: for a library that
        moves bytes only while it is asked. It goes with a watched descriptor."""
        if function is None:
            self._polls.pop(fd, None)
        else:
            self._polls[fd] = function

    def limit(self, fd: int, seconds: float | None) -> None:
        """`late` is due `seconds` from now; None: never."""
        if seconds is None:
            self._deadlines.drop(fd)
        else:
            self._deadlines.grant(fd, time.monotonic(), seconds)

    def forget(self, fd: int) -> None:
        """Stops watching `fd`; called before it is closed."""
        self._polls.pop(fd, None)
        if self._watched.pop(fd, None) is not None:
            self._deadlines.drop(fd)
            self._epoll.unregister(fd)

    def _run(self) -> None:
        try:
            while not self._turn():
                pass
        finally:
            self._epoll.close()
            with self._lock:
                self._closing = True
                os.close(self._wake)

    def _turn(self) -> bool:
        """Waits once and serves all that is ready; returns whether this turn was the last."""
        soonest = self._deadlines.next_deadline()
        timeout = None if soonest is None else max(0.0, soonest - time.monotonic())
        if self._polls:
            timeout = 0.0
        # A process that was suspended may come back from the wait with nothing, though input lies there: that input
        # counts before any deadline.
        for fd, events in self._epoll.poll(timeout) or self._epoll.poll(0.0):
            watched = self._watched.get(fd)  # an earlier callback of this turn may have closed it
            if watched is not None:
                self._guard(fd, partial(watched[0], events))
        for fd, function in list(self._polls.items()):
            if self._polls.get(fd) is function:
                self._guard(fd, function)
        for fd in self._deadlines.expire(time.monotonic()):
            watched = self._watched.get(fd)
            if watched is not None and watched[1] is not None:
                self._guard(fd, watched[1])
        with self._lock:
            closing = self._closing
            calls = list(self._calls)
            self._calls.clear()
            if calls:
                os.eventfd_read(self._wake)
        for function in calls:
            self._guard(-1, function)
        return closing

    def _guard(self, fd: int, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:  # one fault must not end the thread, which serves all writers
            log.exception("a transport callback failed")
            self.forget(fd)
