"""The verdict on a chaos run: pure functions of what was heard and what happened.

A stream under harm must be the undisturbed one: ids, text, log-probabilities, reason and stop string, tokens of prompt
and output. How many prompt tokens were cached depends on the worker and is not compared. Of a stream that its client
left, what came must be a beginning. A stream may fail in two ways, both told in docs/architecture.md, counted apart and
checked against what really happened: two workers that had it were killed while it lived; or its third and last attempt
was on a worker that was killed.

A stream *lived through an event* if it is complete and needed more than one attempt, or if the worker that had it was
stopped or killed meanwhile: its prefill worker up to its first token, its decode worker from then on. That is read from
its timeline and the events' times, so a stream that was handed over after its first token counts as its decode worker's
a little early.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.chaos.aftermath import Aftermath
from baton.chaos.harm import Happening
from baton.chaos.load import Course, Heard
from baton.chaos.plan import LEAST_EVENTS
from baton.errors import Internal, Unavailable
from router.requests.attempts import ATTEMPTS

LEAST_SHARE = 0.3
"""Of complete streams: those that lived through an event."""
NOTICED_S = 1.0
"""How long the router may take for a worker that has just been killed to live."""
POISON = re.compile(r"workers (\S+) and (\S+) died while they had this request")
LOST = re.compile(r"(?:prefill|decode) worker (\S+) is lost")


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a stream is not what it should be. `position` is that of a token, -1 for what is about the whole stream."""

    label: str
    what: str
    position: int
    expected: str
    got: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The figures of a run, and its `complaints`; without any of these all is well."""

    streams: int
    identical: int
    cancelled: int
    poisoned: int
    exhausted: int
    lived: int
    events: dict[str, int]
    failovers: int
    differences: tuple[Difference, ...]
    leftovers: tuple[str, ...]
    complaints: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.complaints

    @property
    def share(self) -> float:
        """Of complete streams: those that lived through an event."""
        complete = self.streams - self.cancelled - self.poisoned - self.exhausted
        return self.lived / complete if complete else 0.0


def difference(label: str, expected: Heard, got: Heard, *, beginning: bool = False) -> Difference | None:
    """The first one, if any. `beginning`: what came need only be a beginning of what was expected."""
    if got.disorder:
        return Difference(label, "order", -1, "each position once, in order", got.disorder)
    first, end = expected.first_position, len(got.ids) if beginning else max(len(got.ids), len(expected.ids))
    for index in range(end):
        for what, (theirs, ours) in {
            "token": (_at(expected.ids, index), _at(got.ids, index)),
            "log-probability": (_at(expected.logprobs, index), _at(got.logprobs, index)),
        }.items():
            if theirs != ours:
                return Difference(label, what, first + index, str(theirs), str(ours))
    text = expected.text[: len(got.text)] if beginning else expected.text
    if got.text != text:
        return Difference(label, "text", -1, repr(text), repr(got.text))
    if not beginning and _end(got) != _end(expected):
        return Difference(label, "end", -1, str(_end(expected)), str(_end(got)))
    return None


def lived_through(course: Course, happened: Sequence[Happening]) -> bool:
    """See above."""
    finished = course.heard.finished
    if finished is None or course.first_token_s is None or course.ended_s is None:
        return False
    timeline = finished.timeline
    spans = {timeline.prefill_worker: (course.started_s, course.first_token_s)}
    if timeline.decode_worker:
        spans[timeline.decode_worker] = (course.first_token_s, course.ended_s)
    if timeline.decode_worker == timeline.prefill_worker:
        spans[timeline.decode_worker] = (course.started_s, course.ended_s)
    hit = any(
        event.target in spans and event.at_s < spans[event.target][1] and spans[event.target][0] < event.until_s
        for event in happened
    )
    return timeline.attempts > 1 or hit


def poisoned(course: Course, happened: Sequence[Happening]) -> bool:
    """Whether it was ended because two workers died that had it, and both were killed while it lived."""
    said = POISON.search(str(course.error))
    return isinstance(course.error, Internal) and said is not None and set(said.groups()) <= _killed(course, happened)


def exhausted(course: Course, happened: Sequence[Happening], failovers: Mapping[str, int]) -> bool:
    """Whether its last attempt ended with a worker that was killed while it lived."""
    said = LOST.search(str(course.error))
    lost = isinstance(course.error, Unavailable) and said is not None and said[1] in _killed(course, happened)
    return lost and failovers.get(course.label, 0) == ATTEMPTS - 1


def judge(
    expected: Sequence[Heard],
    courses: Sequence[Course],
    happened: Sequence[Happening],
    kinds: Sequence[str],
    after: Aftermath,
    failovers: Mapping[str, int],
) -> Judgement:
    """`expected` has the undisturbed stream of each of the plan's requests, in order of the plan; `failovers` are those
    of a stream by its label, as the router logged them."""
    counts: Counter[str] = Counter()
    differences = []
    for course in courses:
        how, found = _judged(expected[(course.number - 1) % len(expected)], course, happened, failovers)
        counts[how] += 1
        counts["lived"] += how == "identical" and lived_through(course, happened)
        if found is not None:
            differences.append(found)
    judgement = Judgement(
        streams=len(courses),
        identical=counts["identical"],
        cancelled=counts["cancelled"],
        poisoned=counts["poisoned"],
        exhausted=counts["exhausted"],
        lived=counts["lived"],
        events={kind: sum(event.kind == kind for event in happened) for kind in kinds},
        failovers=after.failovers,
        differences=tuple(differences),
        leftovers=after.left,
        complaints=(),
    )
    return _with_complaints(judgement)


def _with_complaints(judgement: Judgement) -> Judgement:
    found = []
    if judgement.differences:
        found.append(f"{len(judgement.differences)} streams are not what they should be")
    if judgement.leftovers:
        found.append(f"{len(judgement.leftovers)} things are left over")
    for kind, count in judgement.events.items():
        if count < LEAST_EVENTS:
            found.append(f"the event {kind} happened {count} times, not {LEAST_EVENTS}: the run shows too little")
    if judgement.share < LEAST_SHARE:
        found.append(f"{judgement.share:.0%} of the streams lived through an event, not {LEAST_SHARE:.0%}: too few")
    known: dict[str, Any] = {name: getattr(judgement, name) for name in Judgement.__dataclass_fields__}
    return Judgement(**known | {"complaints": tuple(found)})


def _judged(
    expected: Heard, course: Course, happened: Sequence[Happening], failovers: Mapping[str, int]
) -> tuple[str, Difference | None]:
    """How a stream is counted, and what is wrong with it."""
    heard, whole = course.heard, course.error is None and not course.left
    found = difference(course.label, expected, heard, beginning=not whole)
    if found is not None:
        return "different", found
    if course.left:
        return "cancelled", None
    if poisoned(course, happened):
        return "poisoned", None
    if exhausted(course, happened, failovers):
        return "exhausted", None
    if course.error is not None:
        told = f"{type(course.error).__name__}: {course.error}"
        position = expected.first_position + len(heard.ids)
        return "different", Difference(course.label, "error", position, "a complete stream", told)
    return "identical", None


def _killed(course: Course, happened: Sequence[Happening]) -> set[str]:
    """The workers that were killed while it lived, or so shortly before that it may still have been sent to them."""
    end = course.ended_s if course.ended_s is not None else float("inf")
    kills = [event for event in happened if event.kind == "kill"]
    return {event.target for event in kills if course.started_s <= event.at_s + NOTICED_S and event.at_s <= end}


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _end(heard: Heard) -> tuple[object, ...]:
    finished = heard.finished
    if finished is None:
        return ("no end",)
    return finished.reason.value, finished.stop, finished.usage.prompt_tokens, finished.usage.output_tokens
