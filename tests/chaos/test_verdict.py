"""The verdict, on streams and events made by hand."""

from __future__ import annotations

import pytest

from baton.chaos import report
from baton.chaos.aftermath import ALARMS, EXPLAINED, Aftermath, leftovers
from baton.chaos.harm import Happening
from baton.chaos.load import Heard
from baton.chaos.plan import LEAST_EVENTS
from baton.chaos.verdict import difference, judge, lived_through
from baton.client import FinishReason, PoolStatus, ProcessStatus, Tokens
from baton.errors import Internal, Unavailable
from tests.alarms import alarms
from tests.chaos.builders import FIRST, course, heard, judged, killed

DIED = "workers decode-0 and decode-1 died while they had this request; it is not tried again"
LOST = "decode worker decode-1 is lost: nobody listens at 127.0.0.1:5 any more"
STOPPED = Happening(12.0, 13.0, "stop", "decode-0")


def test_equal_streams_that_lived_through_an_event_are_well() -> None:
    found = judged([course(), course(heard(cached=2))], STOPPED)
    assert (found.identical, found.lived, found.complaints) == (2, 2, ())
    assert report.summary(found)[-1] == "all is well"


@pytest.mark.parametrize(
    ("got", "what", "position"),
    [
        (heard([7, 8, 1, 7]), "token", FIRST + 2),
        (heard([7, 8, 9], "abc"), "token", FIRST + 3),
        (heard([7, 8, 9, 7, 7], "abcaa"), "token", FIRST + 4),
        (heard(text="abcx"), "text", -1),
        (heard(reason=FinishReason.EOS), "end", -1),
        (heard(reason=None), "end", -1),
        (heard(stop="ca"), "end", -1),
    ],
)
def test_what_differs_is_told_with_its_position(got: Heard, what: str, position: int) -> None:
    found = judged([course(got), course()], STOPPED)
    assert [(entry.label, entry.what, entry.position) for entry in found.differences] == [("r0#1", what, position)]
    assert found.complaints == ("1 streams are not what they should be",)
    assert any(line.startswith(f"difference: r0#1: {what}") for line in report.summary(found))


def test_log_probabilities_are_compared() -> None:
    got = heard()
    got.logprobs[1] = got.logprobs[0]
    found = difference("r0#1", heard(), got)
    assert found is not None
    assert (found.what, found.position) == ("log-probability", FIRST + 1)


@pytest.mark.parametrize("position", [FIRST + 3, FIRST + 5])
def test_a_token_that_comes_twice_or_too_early_is_told(position: int) -> None:
    got = heard(reason=None)
    got.take(Tokens(position, (7,), "a"))
    (found,) = judged([course(got)]).differences
    assert found.got == f"position {position} came when {FIRST + 4} was next"


def test_of_a_stream_that_was_left_what_came_must_be_a_beginning() -> None:
    found = judged([course(heard([7, 8], "ab", reason=None), left=True), course(heard([], reason=None), left=True)])
    assert (found.cancelled, found.differences) == (2, ())
    assert judged([course(heard([7, 9], "ab", reason=None), left=True)]).differences[0].position == FIRST + 1
    assert judged([course(heard([7, 8], "aX", reason=None), left=True)]).differences[0].what == "text"


def test_two_deaths_excuse_a_stream_that_lived_meanwhile() -> None:
    lost = course(heard([7, 8], "ab", reason=None), error=Internal(DIED))
    found = judged([lost, course()], killed("decode-0", 11.5), killed("decode-1", 13.9))
    assert (found.poisoned, found.differences) == (1, ())
    for events in ([killed("decode-0", 11.5)], [killed("decode-0", 3.0), killed("decode-1", 13.9)]):
        (difference,) = judged([lost], *events).differences
        assert "died while they had" in difference.got
    wrong = course(heard([7, 1], "ab", reason=None), error=Internal(DIED))
    assert judged([wrong], killed("decode-0", 11.5), killed("decode-1", 13.9)).differences[0].what == "token"


def test_the_third_attempt_excuses_a_stream_whose_worker_was_killed() -> None:
    lost = course(heard([7, 8], "ab", reason=None), error=Unavailable(LOST))
    assert judged([lost], killed("decode-1", 13.9), r0_1=2).exhausted == 1
    assert len(judged([lost], killed("decode-1", 13.9), r0_1=1).differences) == 1
    assert len(judged([lost], killed("decode-0", 13.9), r0_1=2).differences) == 1


def test_a_stream_lived_through_what_hit_the_worker_that_had_it() -> None:
    assert lived_through(course(heard(attempts=2)), [])
    for at_s, until_s, worker, lived in (
        (12.0, 15.0, "decode-0", True),
        (9.0, 10.5, "decode-0", False),  # it was still on the prefill worker
        (9.0, 10.5, "prefill-0", True),
        (12.0, 13.0, "prefill-0", False),
        (14.5, 15.0, "decode-0", False),
        (12.0, 13.0, "decode-1", False),
    ):
        assert lived_through(course(), [Happening(at_s, until_s, "stop", worker)]) is lived, (at_s, worker)
    direct = course(heard(prefill_worker="decode-0"))
    assert lived_through(direct, [Happening(9.0, 10.5, "stop", "decode-0")])


def test_too_little_harm_fails_the_run() -> None:
    assert judged([course()]).complaints == ("0% of the streams lived through an event, not 30%: too few",)
    found = judged([course()], STOPPED)
    assert found.events == {"kill": LEAST_EVENTS, "stop": LEAST_EVENTS + 1, "cancel": LEAST_EVENTS}
    none = judge([heard()], [course()], [STOPPED] * LEAST_EVENTS, ["kill", "stop"], Aftermath((), ()), {})
    assert none.complaints == ("the event kill happened 0 times, not 10: the run shows too little",)


def test_what_is_left_over_fails_the_run() -> None:
    found = judged([course()], STOPPED, left=["decode-0: held blocks: 1"])
    assert found.complaints == ("1 things are left over",)
    assert "left over: decode-0: held blocks: 1" in report.summary(found)


NOTHING = dict.fromkeys(("residents", "prompts_waiting", "handoffs_waiting", "grants", "aborting", "stalled"), 0)


def status(**changes: object) -> ProcessStatus:
    fields: dict[str, object] = {
        "name": "decode-0", "incarnation": "i", "address": "a", "roles": ("decode",),
        "pool": PoolStatus(4, 2, 0, 2, 0, ""), "live": NOTHING, "counters": {}, "resident_bytes": 1,
    }  # fmt: skip
    return ProcessStatus(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"counters": dict.fromkeys(EXPLAINED, 3) | {"cancels": 4}}, []),
        ({"counters": {"late_steps": 1}}, ["alarm late_steps: 1"]),
        ({"live": NOTHING | {"residents": 2}}, ["residents: 2"]),
        ({"live": {name: 0 for name in NOTHING if name != "aborting"}}, ["aborting: not told"]),
        ({"pool": PoolStatus(4, 1, 1, 2, 0, "")}, ["held blocks: 1"]),
        ({"pool": PoolStatus(4, 1, 0, 2, 0, "")}, ["pool: 1 + 0 + 2 + 0 is not 4"]),
        ({"pool": PoolStatus(4, 2, 0, 2, 0, "a block is free twice")}, ["pool: a block is free twice"]),
        ({"roles": (), "pool": None, "live": {"requests": 0, "attempts": 0, "cancelling": 1}}, ["cancelling: 1"]),
    ],
)
def test_a_process_that_is_idle_has_nothing(changes: dict[str, object], told: list[str]) -> None:
    assert leftovers(status(**changes)) == [f"decode-0: {line}" for line in told]


def test_the_alarms_are_those_that_operators_are_told_of() -> None:
    assert alarms() == ALARMS
    assert EXPLAINED < ALARMS
