"""The engine's thread. Its loop: take commands, pick a batch, run it, publish.

The event loop owns requests and blocks; this thread owns sequences while they compute. Commands come by a queue, and
reports go by `call_soon_threadsafe`, one call per step. A sequence's blocks may be freed only after `on_removed`, or
after the step that reported it finished: from then on no step touches them.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from baton.cost import CostModel
from baton.engine.api import Engine, Sampled, Sequence, Work, shape_of
from baton.messages import Pulse
from baton.rpc import awake
from baton.spec import AttemptKey, FinishReason, TokenLogprobs

IDLE_CHECK_S = 1.0
JOIN_S = 10.0
T = TypeVar("T")
log = structlog.get_logger(__name__)


class Scheduler(Protocol):
    """A policy over the engine's step; lives on the engine thread."""

    def add(self, sequence: Sequence) -> None: ...

    def remove(self, key: AttemptKey) -> None:
        """Does nothing when the sequence is unknown."""

    def pick(self) -> list[Work]:
        """The next batch; empty when there is no work."""


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's result of a step. `token_ids[0]` is at absolute `position`. `error` says why the engine can't go
    on with the sequence, whose KV is not to be trusted then."""

    key: AttemptKey
    computed: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step. `started` is monotonic seconds; `error` is set when the step failed as a whole."""

    started: float
    seconds: float
    items: tuple[StepItem, ...]
    error: str = ""


class StepEvents(Protocol):
    """Called on the event loop."""

    def on_step(self, report: StepReport) -> None:
        """Sequences with a `finish` or an `error`, and all of a failed step, are out of the engine already."""

    def on_removed(self, key: AttemptKey) -> None:
        """A sequence that `Runner.remove` named is out of the engine, if it ever was in."""


class Runner:
    """Runs an engine under a scheduler on a thread of its own. Use from the event loop."""

    def __init__(
        self, engine: Engine, scheduler: Scheduler, events: StepEvents, model: CostModel | None = None
    ) -> None:
        """`model` learns from every step."""
        self._engine, self._scheduler, self._events = engine, scheduler, events
        self.model = model or CostModel()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._step_began: float | None = None
        self._number, self._predicted_s = 0, 0.0
        self._loop, self._clock = asyncio.get_running_loop(), awake.clock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def under_way_s(self) -> float:
        """The age of the step under way; 0 between two steps. May be read from any thread."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def pulse(self) -> Pulse:
        """The step under way, or the last one. May be read from any thread."""
        return Pulse(self._number, self.under_way_s, self._predicted_s)

    def add(self, sequence: Sequence) -> None:
        """The sequence's blocks must stay held until it is out again."""
        self._commands.put(lambda: self._scheduler.add(sequence))

    def remove(self, key: AttemptKey) -> None:
        """Takes the sequence out between two steps; `on_removed` confirms it."""
        self._commands.put(lambda: self._remove(key))

    def wake(self, blocks: Iterable[int]) -> None:
        """A sequence in these blocks will come soon, after a rest."""
        self._commands.put(lambda: self._engine.wake(tuple(blocks)))

    def between_steps(self, action: Callable[[], None]) -> None:
        """Runs `action`, which must not raise, on the engine's thread before the next step. Wakes a resting engine."""
        self._commands.put(action)

    def stand_back(self, by: int) -> None:
        """Adds `by` to the nice value (sched(7)) of this thread and of those that it starts later. So threads that pass
        messages, which take microseconds, go first on a shared core. Only on Linux do threads have nice values."""
        thread = self._thread.native_id
        if not by or sys.platform != "linux" or thread is None:
            return
        try:
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + by)
        except OSError as error:
            log.warning("computing can't stand back: messages may wait for it", error=str(error))

    async def stop(self) -> None:
        """Ends the thread after the step in progress."""
        self._stopping = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join, JOIN_S)
        if self._thread.is_alive():
            log.error("the engine thread does not end", waited_s=JOIN_S)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                batch = self._scheduler.pick()
                if batch:
                    self._call(self._events.on_step, self._step(batch))
                else:
                    self._wait_for_command()
        except BaseException:
            # Nothing would be computed any more, and no router would know: end the process, which routers notice.
            log.critical("the engine thread failed; the worker ends", exc_info=True)
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _wait_for_command(self) -> None:
        try:
            self._commands.get(timeout=IDLE_CHECK_S)()
        except queue.Empty:
            return

    def _step(self, batch: list[Work]) -> StepReport:
        shape, started, missed = shape_of(batch), time.monotonic(), self._clock.missed
        self._number, self._predicted_s = self._number + 1, self.model.cost.seconds(shape)
        self._step_began = started
        try:
            sampled = self._engine.step(batch)
        except Exception as error:  # a boundary: these sequences fail, the worker goes on
            log.error("a step failed", sequences=len(batch), exc_info=error)
            for work in batch:
                self._scheduler.remove(work.sequence.key)
            items = tuple(StepItem(work.sequence.key, 0, 0, (), (), None) for work in batch)
            return StepReport(started, time.monotonic() - started, items, f"{type(error).__name__}: {error}")
        finally:
            self._step_began = None
        if self._clock.missed == missed:  # else the process was suspended, and the time tells nothing of the step
            self.model.observe(shape, time.monotonic() - started)
        items = tuple(self._advance(work.sequence, drawn) for work, drawn in zip(batch, sampled, strict=True))
        return StepReport(started, time.monotonic() - started, items)

    def _advance(self, sequence: Sequence, drawn: Sampled | None) -> StepItem:
        """Appends what was drawn, up to and including a token that ends the sequence."""
        position, finish, kept = len(sequence.tokens), None, 0
        if drawn is not None and drawn.error:
            log.error("a sequence failed", attempt=sequence.key.hex()[:12], reason=drawn.error)
            self._scheduler.remove(sequence.key)
            return StepItem(sequence.key, sequence.computed, position, (), (), None, drawn.error)
        for token in drawn.token_ids if drawn else ():
            sequence.tokens.append(token)
            kept += 1
            finish = sequence.rule.reason(token, sequence.output_tokens)
            if finish is not None:
                self._scheduler.remove(sequence.key)
                break
        ids, logprobs = (drawn.token_ids[:kept], drawn.logprobs[:kept]) if drawn else ((), ())
        return StepItem(sequence.key, sequence.computed, position, ids, logprobs, finish)

    def _remove(self, key: AttemptKey) -> None:
        self._scheduler.remove(key)
        self._call(self._events.on_removed, key)

    def _call(self, callback: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:  # the event loop is closed: the process ends
            self._stopping = True


def for_each(items: Iterable[T], act: Callable[[T], None], fail: Callable[[T, str], None]) -> None:
    """Calls `act` with each item. Where that raises, `fail` gets the item and the reason, and the others go on."""
    for item in items:
        try:
            act(item)
        except Exception as error:
            log.error("a step's result could not be handled", exc_info=error)
            try:
                fail(item, f"{type(error).__name__}: {error}")
            except Exception as second:
                log.error("and its sequence could not be ended", exc_info=second)
