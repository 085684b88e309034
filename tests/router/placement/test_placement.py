"""Placement and the ledgers it reads: pure functions of a snapshot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement.policy import pick_decode, pick_prefill
from router.placement.snapshot import DecodeLoad, Demand, PrefillLoad, Queued
from router.workers.ledger import DecodeLedger, PrefillLedger

EMPTY = DecodeLoad("a", tokens=0, sequences=0, free_blocks=100, capacity_blocks=100, max_sequences=8)
DEMAND = Demand(blocks=10, tokens=50)


def test_prefill_goes_where_least_is_queued() -> None:
    decision = pick_prefill([PrefillLoad("a", 900, 100), PrefillLoad("b", 100, 100), PrefillLoad("c", 500, 100)], 10)
    assert decision is not None
    assert decision.chosen == "b"
    assert [candidate.load for candidate in decision.candidates] == [900, 100, 500]


def test_prefill_ties_go_by_name_and_small_pools_are_out() -> None:
    loads = [PrefillLoad("c", 0, 100), PrefillLoad("b", 0, 100), PrefillLoad("a", 0, 9)]
    decision = pick_prefill(loads, 10)
    assert decision is not None
    assert decision.chosen == "b"
    assert "9 blocks" in decision.candidates[2].note
    assert pick_prefill(loads[2:], 10) is None
    assert pick_prefill([], 1) is None


@pytest.mark.parametrize(
    ("second", "chosen"),
    [
        ({"tokens": 100}, "a"),
        ({"tokens": 0}, "a"),
        ({"sequences": 1}, "a"),
        ({"name": "0"}, "0"),
    ],
)
def test_decode_goes_to_the_least_loaded(second: dict[str, object], chosen: str) -> None:
    other = EMPTY._replace(**{"name": "b", **second})  # type: ignore[arg-type]
    decision = pick_decode([other, EMPTY], DEMAND)
    assert decision is not None
    assert decision.chosen == chosen


def test_a_cached_prefix_is_followed_until_its_worker_carries_more_by_as_much() -> None:
    holder = EMPTY._replace(name="holder", cached_tokens=64)
    for tokens, chosen in ((0, "holder"), (63, "holder"), (65, "a")):
        decision = pick_decode([EMPTY, holder._replace(tokens=tokens)], DEMAND)
        assert decision is not None
        assert decision.chosen == chosen


def test_room_counts_more_than_load() -> None:
    full = EMPTY._replace(name="full", free_blocks=9)
    slots = EMPTY._replace(name="slots", sequences=8)
    busy = EMPTY._replace(name="busy", tokens=1500)
    decision = pick_decode([full, slots, busy], DEMAND)
    assert decision is not None
    assert decision.chosen == "busy"
    assert [candidate.feasible for candidate in decision.candidates] == [False, False, True]


def test_without_room_anywhere_the_least_loaded_is_asked() -> None:
    decision = pick_decode([EMPTY._replace(free_blocks=0), EMPTY._replace(name="b", free_blocks=0, tokens=9)], DEMAND)
    assert decision is not None
    assert decision.chosen == "a"
    assert "none has room" in decision.reason


def test_excluded_and_too_small_workers_are_out_and_the_avoided_is_last() -> None:
    b = EMPTY._replace(name="b", tokens=900, free_blocks=0)
    small = EMPTY._replace(name="c", capacity_blocks=9)
    assert pick_decode([EMPTY, small], DEMAND, {"a"}) is None
    assert pick_decode([EMPTY, b, small], DEMAND, {"a"}).chosen == "b"  # type: ignore[union-attr]
    assert pick_decode([EMPTY, b], DEMAND, avoid="a").chosen == "b"  # type: ignore[union-attr]
    assert pick_decode([EMPTY], DEMAND, avoid="a").chosen == "a"  # type: ignore[union-attr]


def test_a_worker_of_larger_memory_takes_more() -> None:
    large = EMPTY._replace(name="large", tokens=100, capacity_blocks=1000, free_blocks=1000)
    assert pick_decode([EMPTY, large], DEMAND).chosen == "large"  # type: ignore[union-attr]


def test_prefill_ledger_keeps_ours_and_what_others_added() -> None:
    ledger = PrefillLedger()
    ledger.place(b"1", 100)
    ledger.place(b"2", 50)
    ledger.reported(400)
    assert ledger.queued_tokens == 400
    ledger.release(b"1", 0.0)
    ledger.release(b"1", 0.0)
    assert ledger.queued_tokens == 300
    ledger.reported(0)
    assert ledger.queued_tokens == 50


def test_time_goes_into_the_most_urgent_prompt_that_has_started() -> None:
    ledger = PrefillLedger()
    ledger.place(b"late", 100, Queued(30.0, 4.0, 30.0, 1.0))
    ledger.place(b"soon", 100, Queued(20.0, 2.0, 20.0, 2.0))
    ledger.place(b"waits", 100, Queued(40.0, 3.0, 40.0, 1.0))
    ledger.started(b"late", 10.0)
    assert ledger.queue(11.25) == [(20.0, 2.0, 20.0, 0.0), (30.0, 2.75, None, 0.75), (40.0, 3.0, 40.0, 0.0)]
    ledger.started(b"soon", 11.5)
    assert ledger.queue(12.5)[:2] == [(20.0, 1.0, None, 1.0), (30.0, 2.5, None, 0.0)]
    ledger.release(b"soon", 13.5)
    assert ledger.queue(13.5)[0] == (30.0, 2.5, None, 0.5)
    assert ledger.queue(99.0)[0].seconds == pytest.approx(0.4), "what takes longer is nearly done"


def test_bound_blocks_count_until_a_report_that_surely_has_them() -> None:
    ledger = DecodeLedger(100)
    ledger.bind(b"1", DEMAND)
    assert ledger.free_blocks == 90
    ledger.reported(free_blocks=100, resident_tokens=0)
    assert ledger.free_blocks == 90
    ledger.resident(b"1")
    assert ledger.free_blocks == 90
    ledger.reported(free_blocks=90, resident_tokens=60)
    assert ledger.free_blocks == 90
    assert ledger.tokens == 60
    ledger.release(b"1")
    assert ledger.tokens == 10
    ledger.reported(free_blocks=100, resident_tokens=0)
    assert (ledger.free_blocks, ledger.tokens, len(ledger)) == (100, 0, 0)


@given(st.lists(st.tuples(st.sampled_from("brxRpP"), st.integers(0, 5), st.integers(0, 200)), max_size=60))
def test_the_books_balance_after_any_history(history: list[tuple[str, int, int]]) -> None:
    decode, prefill = DecodeLedger(500), PrefillLedger()
    bound: set[bytes] = set()
    for action, number, amount in history:
        key = bytes([number])
        if action == "b" and key not in bound:
            bound.add(key)
            decode.bind(key, Demand(amount, amount))
            prefill.place(key, amount)
        elif action == "r":
            decode.resident(key)
        elif action == "x":
            bound.discard(key)
            decode.release(key)
            prefill.release(key, 0.0)
        elif action == "R":
            decode.reported(amount, amount)
        elif action == "P":
            prefill.reported(amount)
        decode.check_integrity()
        prefill.check_integrity()
        assert decode.tokens >= 0
        assert prefill.queued_tokens >= 0
    assert len(decode) == len(prefill) == len(bound)
