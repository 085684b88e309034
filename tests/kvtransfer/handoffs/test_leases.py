from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.handoffs.leases import LeaseTable, PeerLease


def test_an_extension_in_any_order_is_right() -> None:
    """A reaper that trusts insertion order frees the extended lease, or never reaches the short one behind it."""
    table: LeaseTable[str] = LeaseTable()
    table.grant("long", 0.0, 10.0)
    table.grant("short", 0.0, 5.0)
    assert table.renew("short", 1.0, 20.0)
    assert table.next_deadline() == 10.0
    assert table.expire(10.0) == ["long"]
    assert table.expire(20.9) == []
    assert table.expire(21.0) == ["short"]
    assert table.next_deadline() is None


def test_an_expired_lease_is_not_revived() -> None:
    table: LeaseTable[str] = LeaseTable()
    table.grant("a", 0.0, 1.0)
    assert not table.renew("a", 1.0, 5.0)
    assert table.expire(1.0) == ["a"]
    assert not table.renew("a", 1.0, 5.0)
    assert not table.drop("a")
    assert table.pop_earliest() is None


def test_a_renewal_never_shortens_and_a_grant_may() -> None:
    table: LeaseTable[str] = LeaseTable()
    table.grant("a", 0.0, 10.0)
    assert table.renew("a", 0.0, 1.0)
    assert table.next_deadline() == 10.0
    table.grant("a", 0.0, 2.0)
    assert table.expire(2.0) == ["a"]


step = st.tuples(st.sampled_from("grdepn"), st.integers(0, 5), st.integers(1, 20))


@given(st.lists(step, max_size=120))
@settings(deadline=None)
def test_a_lease_table_does_what_a_plain_dictionary_would(steps: list[tuple[str, int, int]]) -> None:
    table: LeaseTable[int] = LeaseTable()
    model: dict[int, float] = {}
    now = 0.0
    for verb, key, seconds in steps:
        if verb == "g":
            table.grant(key, now, seconds)
            model[key] = now + seconds
        elif verb == "r":
            live = model.get(key, now) > now
            assert table.renew(key, now, seconds) == live
            if live:
                model[key] = max(model[key], now + seconds)
        elif verb == "d":
            assert table.drop(key) == (model.pop(key, None) is not None)
        elif verb == "e":
            now += seconds / 4
            expected = sorted(k for k, until in model.items() if until <= now)
            assert sorted(table.expire(now)) == expected
            for k in expected:
                del model[k]
        elif verb == "p":
            earliest = table.pop_earliest()
            assert (earliest is None) == (not model)
            if earliest is not None:
                assert model[earliest] == min(model.values())
                del model[earliest]
        assert table.next_deadline() == min(model.values(), default=None)
        assert len(table) == len(model)


class Measured(LeaseTable[int]):
    @property
    def entries(self) -> int:
        """Of the heap, stale ones included."""
        return len(self._heap)


def test_a_lease_tables_memory_stays_flat() -> None:
    table = Measured()
    rng = random.Random(1)
    for now in range(20_000):
        table.grant(now % 50, now, rng.uniform(1, 1e9))
        table.renew(rng.randrange(50), now, rng.uniform(1, 1e9))
        if rng.random() < 0.5:
            table.drop(rng.randrange(50))
        table.expire(now)
    assert table.entries <= 2 * 50 + 65


def test_the_holder_counts_from_its_request() -> None:
    lease = PeerLease()
    assert not lease.valid(0.0)
    assert lease.renew_at() is None
    lease.asked(10.0)
    lease.asked(13.0)
    lease.granted(9.0)  # the reply to the first came at, say, 18
    assert lease.deadline == 19.0
    assert lease.valid(18.9)
    assert not lease.valid(19.0)
    lease.granted(9.0)
    assert lease.deadline == 22.0
    assert lease.renew_at() == pytest.approx(16.0)
    with pytest.raises(AssertionError):
        lease.granted(9.0)
