"""The bound on communicators, on both sides."""

from __future__ import annotations

import pytest

from baton.errors import PeerClosed
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT, until
from tests.kvtransfer.transports.nccl_sides import Setup, Side


def test_a_receiver_refuses_a_pair_past_its_bound_until_another_one_leaves(nothing_left: None) -> None:
    setup = Setup(max_links=2)
    try:
        channels = []
        for name in ("a", "b", "c"):
            side = setup.side(name)
            channels.append(side.connect(setup.receiver))
        tickets = [setup.bench.ticket(range(8 * i, 8 * i + 8), writer=name) for i, name in enumerate("abc")]
        for number in (0, 1):
            setup.write(channels[number], tickets[number], range(8)).result(GENEROUS)
        with pytest.raises(PeerClosed, match="all 2 communicators of this device are taken"):
            setup.write(channels[2], tickets[2], range(8)).result(GENEROUS)
        for number in (0, 1):  # those that have one keep it
            setup.write(channels[number], tickets[number], range(8)).result(GENEROUS)
        assert setup.device.minted == 2
        channels[1].close()
        again = setup.sides[2].connect(setup.receiver)
        until(lambda: len(setup.receiver._connections) == 2)
        setup.write(again, tickets[2], range(8)).result(GENEROUS)
        assert setup.device.minted == 3
        assert all(setup.intact(side, ticket) for side, ticket in zip(setup.sides, tickets, strict=True))
    finally:
        setup.close()


def test_a_writer_refuses_a_receiver_past_its_bound(nothing_left: None) -> None:
    setups = [Setup(), Setup()]
    side = Side("writer", 1, max_links=1)
    try:
        channels = [side.connect(setup.receiver) for setup in setups]
        tickets = [setup.bench.ticket(range(8)) for setup in setups]
        assert setups[0].write(channels[0], tickets[0], range(8)).result(GENEROUS).bytes == 8 * LAYOUT.block_bytes
        with pytest.raises(PeerClosed, match="all 1 communicators of this device are taken"):
            setups[1].write(channels[1], tickets[1], range(8)).result(GENEROUS)
        assert setups[0].write(channels[0], tickets[0], range(8)).result(GENEROUS).bytes == 8 * LAYOUT.block_bytes
        channels[0].close()
        again = side.connect(setups[1].receiver)
        setups[1].write(again, tickets[1], range(8)).result(GENEROUS)
        assert all(setup.intact(side, ticket) for setup, ticket in zip(setups, tickets, strict=True))
        assert side.device.opened == 2
    finally:
        side.close()
        for setup in setups:
            setup.close()


def test_a_refused_pair_is_told_at_once_and_a_busy_one_goes_on(nothing_left: None) -> None:
    setup = Setup(max_links=1)
    try:
        busy, late = setup.side("busy"), setup.side("late")
        busy.device.faults.flowing.clear()
        first, second = setup.bench.ticket(range(8), writer="busy"), setup.bench.ticket(range(8, 16), writer="late")
        channel = busy.connect(setup.receiver)
        running = setup.write(channel, first, range(8))
        until(lambda: setup.device.opened == 1)
        with pytest.raises(PeerClosed, match="taken"):
            setup.write(late.connect(setup.receiver), second, range(8)).result(GENEROUS / 4)
        busy.device.faults.flowing.set()
        running.result(GENEROUS)
        channel.close()
        until(lambda: len(setup.receiver._connections) <= 1)
        setup.write(late.connect(setup.receiver), second, range(8)).result(GENEROUS)
        assert setup.intact(late, second)
    finally:
        setup.close()
