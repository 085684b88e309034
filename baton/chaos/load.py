"""The streams of a chaos run, as a client hears them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.chaos.plan import ChaosPlan, Script
from baton.client import (
    Accepted,
    Client,
    Event,
    Finished,
    FinishReason,
    RequestOptions,
    TokenLogprobs,
    Tokens,
)
from baton.errors import BatonError, Internal
from baton.rpc.net import cancelling

AFTER_ERROR_S = 0.2
"""A cluster that fails at once is not asked a thousand times a second."""


@dataclass(slots=True)
class Heard:
    """What came of a stream. `disorder` says which position came out of its order, if any did."""

    first_position: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    accepted: Accepted | None = None
    finished: Finished | None = None
    disorder: str = ""

    def take(self, event: Event) -> None:
        match event:
            case Accepted():
                self.accepted = event
            case Tokens():
                due = self.first_position + len(self.ids)
                if event.position != due and event.ids and not self.disorder:
                    self.disorder = f"position {event.position} came when {due} was next"
                self.ids += event.ids
                self.text += event.text
                self.logprobs += event.logprobs
            case Finished():
                self.finished = event

    @property
    def reason(self) -> FinishReason | None:
        return self.finished.reason if self.finished else None


@dataclass(slots=True)
class Course:
    """One stream: its request, what was heard, and when, in seconds of the run's clock. It ended well, with an `error`,
    or because its client `left` it. Streams under harm are numbered from 1 on; undisturbed ones have the number 0."""

    number: int
    script: Script
    heard: Heard
    started_s: float
    first_token_s: float | None = None
    ended_s: float | None = None
    error: BatonError | None = None
    left: bool = False

    @property
    def label(self) -> str:
        """Its request's label in the cluster's logs."""
        return f"{self.script.label}#{self.number}"


class ChaosLoad:
    """Keeps the plan's number of streams under way. `courses` are all streams under harm so far, in their order."""

    def __init__(self, client: Client, plan: ChaosPlan, clock: Callable[[], float]) -> None:
        self._client, self._plan, self._clock = client, plan, clock
        self.courses: list[Course] = []
        self._live: dict[int, asyncio.Task[None]] = {}

    async def undisturbed(self) -> list[Heard]:
        """Each request of the plan once, in order, before any harm. Raises Internal for one that fails or is slow."""
        courses = [self._course(0, script) for script in self._plan.scripts]
        waiting = iter(courses)

        async def some() -> None:
            for course in waiting:
                await self._hear(course)

        await asyncio.gather(*(some() for _ in range(self._plan.at_once)))
        for course in courses:
            trouble = course.heard.disorder or course.error
            if trouble or course.heard.finished is None:
                raise Internal(f"the undisturbed stream {course.label} failed: {trouble or 'it had no end'}")
        return [course.heard for course in courses]

    async def run(self, over: asyncio.Event) -> None:
        """Sends the plan's requests in turn until `over` is set, and then lasts until the last stream has ended."""
        await asyncio.gather(*(self._one_after_another(over) for _ in range(self._plan.at_once)))

    def candidates(self) -> list[Course]:
        """The streams that are under way and that their client has not left, in their order."""
        return [course for number in sorted(self._live) if not (course := self.courses[number - 1]).left]

    def leave(self, course: Course) -> bool:
        """The client leaves its stream now, wherever that is; False where it has just ended."""
        task = self._live.get(course.number)
        if task is None or not task.cancel():
            return False
        course.left = True
        return True

    async def _one_after_another(self, over: asyncio.Event) -> None:
        scripts = self._plan.scripts
        while not over.is_set():
            course = self._course(len(self.courses) + 1, scripts[len(self.courses) % len(scripts)])
            self.courses.append(course)
            task = self._live[course.number] = asyncio.create_task(self._hear(course))
            try:
                async with cancelling(task):
                    await asyncio.wait({task})
            finally:
                del self._live[course.number]
            if not task.cancelled():
                task.result()
            if course.error is not None:
                await asyncio.sleep(AFTER_ERROR_S)

    def _course(self, number: int, script: Script) -> Course:
        return Course(number, script, Heard(script.first_position), self._clock())

    async def _hear(self, course: Course) -> None:
        """The deadline of the call bounds it."""
        course.started_s = self._clock()
        options = course.script.options | RequestOptions(request_id=course.label)
        events = self._client.generate(timeout=self._plan.stream_s, **options)
        try:
            async with aclosing(events):
                async for event in events:
                    course.heard.take(event)
                    if course.first_token_s is None and course.heard.ids:
                        course.first_token_s = self._clock()
        except BatonError as error:
            course.error = error
        finally:
            course.ended_s = self._clock()
