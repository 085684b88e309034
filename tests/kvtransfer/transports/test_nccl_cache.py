"""The bounded cache of communicators, on both sides."""

from __future__ import annotations

import pytest

from baton.errors import DeadlineExceeded
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT
from tests.kvtransfer.transports.nccl_sides import Setup, Side, until


def test_the_cache_is_bounded_and_the_longest_idle_goes_first(nothing_left: None) -> None:
    setup = Setup(max_links=2)
    try:
        channels = []
        for name in ("a", "b", "c"):
            side = setup.side(name)
            channels.append(side.connect(setup.receiver))
        tickets = [setup.bench.ticket(range(8 * i, 8 * i + 8), writer=name) for i, name in enumerate("abc")]
        for number in (0, 1, 0, 2):  # c takes the place of b, which is idle for longer than a
            setup.write(channels[number], tickets[number], range(8)).result(GENEROUS)
        assert setup.device.minted == 3
        setup.write(channels[0], tickets[0], range(8)).result(GENEROUS)
        assert setup.device.minted == 3, "a is still there"
        setup.write(channels[1], tickets[1], range(8)).result(GENEROUS)
        assert setup.device.minted == 4, "b was made anew"
        assert all(setup.intact(side, ticket) for side, ticket in zip(setup.sides, tickets, strict=True))
    finally:
        setup.close()


def test_a_writer_with_many_receivers_evicts_only_idle_ones(nothing_left: None) -> None:
    setups = [Setup(), Setup(), Setup()]
    side = Side("writer", 1, max_links=1)
    try:
        channels = [side.connect(setup.receiver) for setup in setups]
        tickets = [setup.bench.ticket(range(8)) for setup in setups]
        running = [s.write(c, t, range(8)) for s, c, t in zip(setups, channels, tickets, strict=True)]
        assert [run.result(GENEROUS).bytes for run in running] == [8 * LAYOUT.block_bytes] * 3
        assert all(setup.intact(side, ticket) for setup, ticket in zip(setups, tickets, strict=True))
        assert side.device.opened >= 3
    finally:
        side.close()
        for setup in setups:
            setup.close()


def test_no_room_in_the_cache_ends_at_the_deadline(nothing_left: None) -> None:
    setup = Setup(max_links=1)
    try:
        busy, late = setup.side("busy"), setup.side("late")
        busy.device.faults.flowing.clear()
        first, second = setup.bench.ticket(range(8), writer="busy"), setup.bench.ticket(range(8, 16), writer="late")
        running = setup.write(busy.connect(setup.receiver), first, range(8))
        until(lambda: setup.device.opened == 1)
        channel = late.connect(setup.receiver)
        with pytest.raises(DeadlineExceeded):
            setup.write(channel, second, range(8), seconds=0.3).result(GENEROUS)
        busy.device.faults.flowing.set()
        running.result(GENEROUS)
        setup.write(late.connect(setup.receiver), second, range(8)).result(GENEROUS)
        assert setup.intact(late, second)
    finally:
        setup.close()
