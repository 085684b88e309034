"""Which transport a pair takes: the best one that connects, and what it says of those that did not."""

from __future__ import annotations

import threading
import time

import pytest
from structlog.testing import capture_logs

from baton.errors import DeadlineExceeded, Mismatch, PeerClosed
from baton.spec import ProcessRef, RefusalReason
from baton.worker.sending import pair as module
from baton.worker.sending.connecting import WHY_CHARS
from kvtransfer.transports.base import Channel, Writer
from tests.rpc.waiting import until
from tests.worker.sending.pairs import bench
from tests.worker.sending.test_mover import ScriptedChannel


class ScriptedWriter(Writer):
    """Raises what it is told to, or connects; None stands for a black hole."""

    kind = "scripted"

    def __init__(self, *outcomes: Exception | str | None) -> None:
        self.outcomes = list(outcomes)
        self.tried: list[tuple[str, float]] = []
        self.channel = ScriptedChannel()

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        seconds = deadline - time.monotonic()
        self.tried.append((endpoint, seconds))
        outcome = self.outcomes.pop(0) if self.outcomes else "works"
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            threading.Event().wait(seconds)
            raise DeadlineExceeded(f"{peer.name} did not answer at {endpoint}")
        return self.channel


REFUSED = PeerClosed("d0 refused the connection")


async def test_the_best_that_connects_is_taken_and_no_other_is_tried() -> None:
    first, second = ScriptedWriter(), ScriptedWriter()
    with capture_logs() as logs:
        async with bench({"shm": first, "tcp": second}) as b:
            assert await b.up() == "shm"
            assert b.stream.note == ""
            await until(lambda: b.told.channels, "the moves")
            assert b.told.channels == [first.channel]
            assert second.tried == []
    (line,) = (log for log in logs if log["event"] == "control stream up")
    assert (line["log_level"], line["transport"]) == ("info", "shm")


async def test_what_does_not_connect_gives_way_to_the_next_and_is_named() -> None:
    first, second = ScriptedWriter(REFUSED), ScriptedWriter()
    with capture_logs() as logs:
        async with bench({"shm": first, "tcp": second}) as b:
            assert await b.up() == "tcp"
            assert b.stream.note == "shm: d0 refused the connection"
            await until(lambda: b.told.channels, "the moves")
            assert b.told.channels == [second.channel]
    (line,) = (log for log in logs if log["event"] == "control stream up")
    expected = ("warning", "tcp", "shm: d0 refused the connection")
    assert (line["log_level"], line["transport"], line["not_used"]) == expected


async def test_an_endpoint_without_an_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.6)
    first, second, third = ScriptedWriter(None), ScriptedWriter(REFUSED), ScriptedWriter()
    async with bench({"nixl": first, "shm": second, "tcp": third}) as b:
        assert await b.up() == "tcp"
        assert b.stream.note == "nixl: d0 did not answer at at-nixl; shm: d0 refused the connection"
        (_, nixl), (_, shm), (_, tcp) = (*first.tried, *second.tried, *third.tried)
        assert nixl <= 0.2
        assert shm <= 0.3
        assert 0 < tcp <= 0.4


async def test_connecting_leaves_enough_of_a_short_lease_to_renew_it() -> None:
    async with bench({"shm": ScriptedWriter(None), "tcp": ScriptedWriter()}, lease_s=0.9) as b:
        assert await b.up() == "tcp"
        await until(lambda: b.answering.renewals >= 3, "renewals")
        assert b.told.downs == []


@pytest.mark.parametrize("before", [[], [REFUSED]])
async def test_settings_that_differ_are_not_got_around(before: list[Exception]) -> None:
    """TLS on one end: the operator hears of it, and no other transport moves a byte."""
    last = ScriptedWriter()
    first: dict[str, Writer] = {"shm": ScriptedWriter(*before)} if before else {}
    async with bench(first | {"tcp": ScriptedWriter(Mismatch("tls", "on", "off")), "nixl": last}) as b:
        reason, message = await b.down()
        assert reason is RefusalReason.MISMATCH
        assert "tls differs: here on, there off" in message
        assert ("shm: d0 refused the connection" in message) == bool(before)
        assert (last.tried, b.told.ups) == ([], 0)


async def test_where_none_connects_one_bounded_error_names_every_try() -> None:
    wordy = PeerClosed("no way\n" * 1000)
    async with bench({"shm": ScriptedWriter(REFUSED), "tcp": ScriptedWriter(wordy)}) as b:
        reason, message = await b.down()
        assert reason is RefusalReason.UNREACHABLE
        assert message.startswith("d0: no transport works: shm: d0 refused the connection; tcp: no way no way ")
        assert "\n" not in message
        assert len(message) < 2 * WHY_CHARS + 50
        assert not b.stream.up


async def test_after_a_break_the_best_is_tried_again() -> None:
    first, second = ScriptedWriter(REFUSED), ScriptedWriter()
    async with bench({"shm": first, "tcp": second}, lease_s=0.3) as b:
        assert await b.up() == "tcp"
        b.answering.broken.set()  # at the next renewal
        await until(lambda: b.told.downs, "the break")
        assert await b.up() == "shm"
        assert b.stream.note == ""
        assert b.answering.handshakes == 2


async def test_endpoints_that_this_side_does_not_know_are_passed_over() -> None:
    with_unknown = [("warp", "nowhere"), ("tcp", "at-tcp"), ("tcp", "at-tcp")]
    async with bench({"tcp": ScriptedWriter()}, with_unknown) as b:
        assert (await b.up(), b.stream.note) == ("tcp", "")
