"""The one thread that calls NCCL for a device: communicators within a bound, and every wait with a deadline.

    opening --both ranks--> idle --post--> busy --event--> idle ...
       |                     |              |
       +------- error, deadline, abort -----+--> aborting --stream drained--> gone

A wait is an event query, a check for asynchronous errors and a deadline, again and again; it never blocks inside the
library. Since one thread makes all calls, none is ever inside a communicator that is aborted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvtransfer.transports.nccl.seam import RECEIVER, Communicator, CommunicatorError, Device, Span

log = logging.getLogger(__name__)

POLL_SECONDS = 100e-6  # while something is under way
CLOSE_SECONDS = 10.0
MAX_LINKS = 64


@dataclass(eq=False, slots=True)
class Link:
    """One communicator, as other threads see it. Only the issuing thread changes it, and each field goes one way only,
    so that a late look misses nothing; `changed` is called there after each change."""

    rank: int
    unique_id: bytes
    deadline: float
    changed: Callable[[Link], None]
    opened: bool = False
    posted: int = 0
    """Groups that were issued; of these `completed` have ended."""
    completed: int = 0
    failure: str = ""
    """Why it was aborted; empty while it is good. `late`: a deadline had passed."""
    late: bool = False
    gone: bool = False
    """Proof: the abort has returned and the stream is drained."""

    @property
    def settled(self) -> bool:
        """Nothing is under way."""
        return self.opened and self.posted == self.completed and not self.failure


class Issuer:
    """Owns a device's communicators, at most `max_links`. All methods may be called from any thread and return at once,
    but for `close`.

    A process has one for each device: its receiver and its writer share it, and its maker closes it after them.
    """

    def __init__(self, device: Device, max_links: int = MAX_LINKS) -> None:
        self._device = device
        self._max_links = max_links
        self._links: dict[Link, Communicator] = {}
        self._stuck: set[Link] = set()
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing_until: float | None = None
        self._thread = threading.Thread(target=self._run, name="kv-nccl-device", daemon=True)
        self._thread.start()

    def open(self, rank: int, unique_id: bytes, deadline: float, changed: Callable[[Link], None]) -> Link:
        """Begin a communicator. A receiver's unique id is minted here. Past the bound the link fails at once."""
        link = Link(rank, unique_id, deadline, changed)
        if not self._call(partial(self._start, link)):
            link.failure, link.gone = "the transport is closed", True
        return link

    def post(self, link: Link, group: Sequence[Span], fence: object | None, deadline: float) -> None:
        """Issue one group on an opened link with nothing under way."""
        self._call(partial(self._post, link, group, fence, deadline))

    def abort(self, link: Link, why: str) -> None:
        """End it. `gone` follows when nothing is read or written any more; nothing else does after that."""
        self._call(partial(self._abort, link, why))

    def close(self) -> None:
        """Abort everything and end the thread. Idempotent. A library that does not let go is left behind."""
        with self._changed:
            if self._closing_until is None:
                self._closing_until = time.monotonic() + CLOSE_SECONDS
            self._changed.notify()
        self._thread.join(2 * CLOSE_SECONDS)
        if self._thread.is_alive() or self._links:
            log.error("nccl: %d communicators could not be ended", len(self._links))

    def _call(self, command: Callable[[], None]) -> bool:
        with self._changed:
            if self._closing_until is not None:
                return False
            self._commands.append(command)
            self._changed.notify()
        return True

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Serves the commands and looks once at every link under way; returns whether to go on."""
        with self._changed:
            if not self._commands and self._closing_until is None:
                self._changed.wait(POLL_SECONDS if self._pending() else None)
            commands = list(self._commands)
            self._commands.clear()
            closing_until = self._closing_until
        for command in commands:
            _guard(command)
        if closing_until is not None:
            for link in list(self._links):
                self._abort(link, "the transport is closed")
            if not self._pending() or time.monotonic() > closing_until:
                return False
            time.sleep(POLL_SECONDS)
        for link in [link for link in self._links if not link.settled and link not in self._stuck]:
            _guard(partial(self._advance, link))
        return True

    def _pending(self) -> bool:
        return any(not link.settled and link not in self._stuck for link in self._links)

    def _advance(self, link: Link) -> None:
        communicator = self._links[link]
        try:
            if link.failure:
                if communicator.drained():
                    del self._links[link]
                    link.gone = True
                    link.changed(link)
            elif communicator.poll():
                link.completed = link.posted
                link.opened = True
                link.changed(link)
            elif time.monotonic() >= link.deadline:
                why = "the group did not end in time" if link.opened else "the peer did not join in time"
                self._abort(link, why, late=True)
        except CommunicatorError as error:
            if link.failure:
                self._give_up(link, error)
            else:
                self._abort(link, str(error))

    def _post(self, link: Link, group: Sequence[Span], fence: object | None, deadline: float) -> None:
        if link.failure:
            return
        assert link.settled, "one group at a time"
        link.deadline = deadline
        link.posted += 1
        try:
            self._links[link].post(group, fence)
        except CommunicatorError as error:
            self._abort(link, str(error))
        else:
            link.changed(link)

    def _abort(self, link: Link, why: str, late: bool = False) -> None:
        if link.failure:
            return
        link.failure, link.late = why, late
        try:
            self._links[link].abort()
        except CommunicatorError as error:
            self._give_up(link, error)
        link.changed(link)

    def _give_up(self, link: Link, error: CommunicatorError) -> None:
        """No proof can follow: the blocks that wait for it stay in quarantine, and the link still counts as taken."""
        log.error("nccl: a communicator could not be ended: %s", error)
        self._stuck.add(link)

    def _start(self, link: Link) -> None:
        taken = sum(not other.failure or other in self._stuck for other in self._links)  # the others are leaving
        try:
            if taken >= self._max_links:
                raise CommunicatorError(f"all {self._max_links} communicators of this device are taken")
            if link.rank == RECEIVER:
                link.unique_id = self._device.mint()
            self._links[link] = self._device.open(link.unique_id, link.rank)
        except CommunicatorError as error:
            link.failure, link.gone = str(error), True
        link.changed(link)


def _guard(function: Callable[[], None]) -> None:
    try:
        function()
    except Exception:  # one fault must not end the thread, which serves all pairs
        log.exception("nccl: the issuing thread met a fault")
