"""What is served while a pool is empty, by path, and what counts as empty."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from baton.config import PathChoice, RoleName
from baton.cost import StepCost
from baton.errors import ResourceExhausted, Unavailable
from baton.telemetry import Counts
from router.placement.offers import Way
from router.workers import pools
from router.workers.pools import PoolWatch, missing, serves
from router.workers.served_model import ServedModel
from router.workers.worker import Worker
from tests.router.requests.builders import CARD, model, placer, request, worker

pytestmark = pytest.mark.asyncio
BOTH: tuple[RoleName, ...] = ("prefill", "decode")


def workers(roles: Sequence[RoleName]) -> list[Worker]:
    return [worker(role, 0) for role in roles]


def detached(role: RoleName, breaks: int = 1) -> Worker:
    made = worker(role, 0)
    made.link.attached, made.link.breaks = False, breaks
    return made


PATHS: dict[tuple[PathChoice, tuple[RoleName, ...], int], str] = {
    ("adaptive", BOTH, 8): "prefill",
    ("adaptive", ("decode",), 8): "direct",
    ("adaptive", ("decode",), 1): "direct",
    ("adaptive", ("prefill",), 8): "no decode",
    ("adaptive", ("prefill",), 1): "prefill",
    ("adaptive", (), 8): "no decode",
    ("adaptive", (), 1): "no decode",
    ("disaggregated", BOTH, 8): "prefill",
    ("disaggregated", ("decode",), 8): "no prefill",
    ("disaggregated", ("decode",), 1): "no prefill",
    ("disaggregated", ("prefill",), 8): "no decode",
    ("disaggregated", ("prefill",), 1): "prefill",
    ("disaggregated", (), 8): "no prefill",
    ("direct", ("decode",), 8): "direct",
    ("direct", BOTH, 1): "direct",
    ("direct", ("prefill",), 8): "no decode",
    ("direct", ("prefill",), 1): "no decode",
}


@pytest.mark.parametrize(("path", "roles", "max_tokens"), PATHS)
@pytest.mark.parametrize("cost", [True, False], ids=["predicted", "by tokens"])
async def test_what_the_pools_that_are_there_can_do_is_done(
    path: PathChoice, roles: tuple[RoleName, ...], max_tokens: int, cost: bool
) -> None:
    wanted, counts, there = PATHS[path, roles, max_tokens], Counts(), workers(roles)
    for each in there:
        each.cost = each.cost if cost else None
    asked = request(None, model(*there), max_tokens=max_tokens, tokens=300)
    placed = placer(path, counts)
    if wanted.startswith("no "):
        with pytest.raises(Unavailable, match=f"{wanted} worker of m is there") as caught:
            placed.place(asked)
        assert caught.value.constraint == f"{wanted.removeprefix('no ')}_workers"
        assert caught.value.retry_after_s
        assert ("forbids" in str(caught.value)) == (path == "disaggregated" and wanted == "no prefill")
        return
    chosen, found = placed.place(asked)
    assert (found.way, chosen) == (Way(wanted), there[-1 if wanted == "direct" else 0])
    degraded = path == "adaptive" and "prefill" not in roles
    assert found.reason.endswith("; no prefill worker is there") == degraded
    assert counts.snapshot().get("placed_degraded", 0) == degraded
    (told,) = placed.explanations.find("", "r")
    assert told.reason == found.reason


async def test_a_decode_worker_that_knows_no_prompts_yet_computes_them_all_the_same() -> None:
    decode = worker("decode", 0)
    decode.cost = StepCost(step=0.005, per_sequence=0.001)
    chosen, found = placer("adaptive").place(request(None, model(decode)))
    assert (chosen, found.way, found.ttft_s) == (decode, Way.DIRECT, None)


async def test_without_prefill_workers_too_small_a_decode_pool_is_named() -> None:
    with pytest.raises(ResourceExhausted, match="no decode worker's pool has 8 blocks") as caught:
        placer("adaptive").place(request(None, model(worker("decode", 0, blocks=4))))
    assert caught.value.constraint == "decode_blocks"


@pytest.mark.parametrize("away", BOTH)
@pytest.mark.parametrize("path", ["adaptive", "disaggregated"])
async def test_a_worker_whose_stream_broke_is_there(path: PathChoice, away: RoleName) -> None:
    there = model(*(detached(role) if role == away else worker(role, 0) for role in BOTH))
    assert placer(path).place(request(None, there))[1].way is Way.PREFILL
    assert serves(path, there)
    assert not missing(path, there)


async def test_one_that_was_never_attached_or_is_lost_is_not() -> None:
    lost = detached("prefill")
    lost.lost = True
    for absent in (detached("prefill", breaks=0), lost):
        there = model(absent, worker("decode", 0))
        assert list(missing("adaptive", there)) == ["prefill"]
        assert placer("adaptive").place(request(None, there))[1].way is Way.DIRECT


async def test_one_that_is_attached_goes_before_one_that_is_not() -> None:
    usable = worker("prefill", 1)
    there = model(detached("prefill"), usable, worker("decode", 0))
    assert there.there("prefill") == [usable]
    assert placer("disaggregated").place(request(None, there))[0] is usable


@pytest.mark.parametrize(
    ("path", "roles", "some", "lacks"),
    [
        ("adaptive", BOTH, True, {}),
        ("adaptive", ("decode",), True, {"prefill": "prompts are computed in place"}),
        ("adaptive", ("prefill",), False, {"decode": "only requests for a single token"}),
        ("adaptive", (), False, {"prefill": "all requests are refused", "decode": "all requests are refused"}),
        ("disaggregated", ("decode",), False, {"prefill": "all requests are refused: the path setting"}),
        ("disaggregated", ("prefill",), False, {"decode": "only requests for a single token"}),
        ("direct", ("decode",), True, {}),
        ("direct", ("prefill",), False, {"decode": "all requests are refused"}),
    ],
)
async def test_what_is_missing_is_said(
    path: PathChoice, roles: tuple[RoleName, ...], some: bool, lacks: dict[RoleName, str]
) -> None:
    there = model(*workers(roles))
    assert serves(path, there) == some
    said = missing(path, there)
    assert list(said) == list(lacks)
    for role, words in lacks.items():
        assert said[role].startswith(f"m: no {role} worker; {words}")


async def test_the_log_tells_of_each_change_once() -> None:
    prefill, decode = workers(BOTH)
    m, other = model(prefill, decode), ServedModel(replace(CARD, name="other"), workers=workers(BOTH))
    models = {"m": m, "other": other}
    watch = PoolWatch("adaptive", models)

    def told() -> list[tuple[str, str, str]]:
        with capture_logs() as logs:
            for _ in range(2):
                watch.changed()
                watch.look()
        return [(entry["log_level"], entry["event"], entry.get("missing") or entry["pool"]) for entry in logs]

    def leaves(role: RoleName) -> Worker:
        gone = next(each for each in m.workers if role in each.registration.roles)
        m.workers.remove(gone)
        m.changed()
        return gone

    def joins(back: Worker) -> None:
        m.workers.append(back)
        m.changed()

    leaves("prefill")
    lacks = "m: no prefill worker; prompts are computed in place, on decode workers"
    assert told() == [("info", "degraded", lacks)], "at a start it has not come yet"
    joins(prefill)
    assert told() == [("info", "no longer degraded", "prefill")]
    leaves("prefill")
    assert told() == [("warning", "degraded", lacks)]
    joins(prefill)
    assert told() == [("info", "no longer degraded", "prefill")]
    prefill.link.attached, prefill.link.breaks = False, 1
    m.changed()
    assert told() == [], "its stream only broke"
    del models["m"]
    assert told() == [], "the model is gone, not whole"
    watch.close()


async def test_the_log_waits_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "TOLD_AFTER_S", 0.05)
    m = model(worker("decode", 0))
    watch, looks = PoolWatch("adaptive", {"m": m}), 0

    def look() -> None:
        nonlocal looks
        looks += 1
        PoolWatch.look(watch)

    monkeypatch.setattr(watch, "look", look)
    with capture_logs() as logs:
        watch.changed()
        watch.changed()
        assert not logs
        async with asyncio.timeout(5):
            while not logs:
                await asyncio.sleep(0.01)
        watch.changed()
        watch.close()
        await asyncio.sleep(0.1)
    assert (looks, [entry["event"] for entry in logs]) == (1, ["degraded"])
