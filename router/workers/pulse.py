"""Whether a worker that has sequences still moves.

    MOVING <-> STALLED      its streams go on elsewhere; it is not lost, and takes new work when it moves again

It has stalled when nothing came from it for SILENT_S, or when its step is far older than it was expected to become.
Both go by a clock that stands still while this process is away.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from baton.messages import Pulse
from baton.rpc import awake

SILENT_S = 1.5
STEP_S, TIMES_PREDICTED = 2.0, 10.0
"""A step is overdue past both."""


class Watch:
    """`stalled` says why, and is empty while the worker moves. `on_change` is called when that changes; `on_stalled`
    every SILENT_S while it does not, since another worker may have room by then."""

    def __init__(self, busy: Callable[[], bool], on_change: Callable[[], None], on_stalled: Callable[[], None]) -> None:
        """`busy`: whether the worker has sequences of ours; others are not judged."""
        self.stalled = ""
        self._busy, self._on_change, self._on_stalled = busy, on_change, on_stalled
        self._timer: awake.Timer | None = None
        self._told_at = -math.inf

    def start(self) -> None:
        """A stream is up."""
        self.stop()
        self._timer = awake.Timer(SILENT_S, self._silent)
        self._set("")

    def stop(self) -> None:
        """The stream is down: whether the worker lives is another's question."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def heard(self, pulse: Pulse | None) -> None:
        """A frame came; `pulse` where it is a heartbeat with a step."""
        if self._timer is not None:
            self._timer.restart()
        if pulse is not None and pulse.age_s > max(STEP_S, TIMES_PREDICTED * pulse.predicted_s):
            self._judge(f"a step has taken {pulse.age_s:.1f} s")
        elif self.stalled:
            self._set("")

    def _silent(self) -> None:
        self._judge(f"nothing came from it for {SILENT_S:g} s")
        if self._timer is not None:
            self._timer.restart()

    def _judge(self, why: str) -> None:
        if not self._busy():
            return
        self._set(why)
        if awake.now() - self._told_at >= SILENT_S:
            self._told_at = awake.now()
            self._on_stalled()

    def _set(self, stalled: str) -> None:
        was, self.stalled = self.stalled, stalled
        if bool(was) != bool(stalled):
            self._on_change()
