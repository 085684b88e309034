"""The plan: a pure function of its seed, with enough of everything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from baton.chaos.config import ChaosConfig
from baton.chaos.harm import KINDS
from baton.chaos.plan import LEAST_EVENTS, make_plan
from baton.errors import ConfigError

KNOWN = list(KINDS)


def test_the_same_seed_makes_the_same_plan_and_another_seed_another() -> None:
    config = ChaosConfig(seed=7)
    assert make_plan(config, KNOWN) == make_plan(config, KNOWN)
    other = make_plan(replace(config, seed=8), KNOWN)
    assert other.scripts != make_plan(config, KNOWN).scripts
    assert other.strikes != make_plan(config, KNOWN).strikes


@pytest.mark.parametrize("minutes", [0.05, 0.5, 3.0])
def test_each_kind_comes_often_enough_in_the_time_of_the_harm(minutes: float) -> None:
    plan = make_plan(ChaosConfig(minutes=minutes), KNOWN)
    counts = Counter(strike.kind for strike in plan.strikes)
    assert set(counts) == set(KNOWN)
    assert min(counts.values()) == max(counts.values()) >= LEAST_EVENTS
    times = [strike.at_s for strike in plan.strikes]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= plan.seconds == minutes * 60
    longest = max(after - before for before, after in pairwise(times))
    assert longest < plan.seconds / 4, "they are spread over it"


def test_a_new_kind_leaves_the_others_where_they_were() -> None:
    config = ChaosConfig(seed=3)
    more = make_plan(config, [*KNOWN, "drain"])
    assert tuple(strike for strike in more.strikes if strike.kind != "drain") == make_plan(config, KNOWN).strikes


def test_requests_are_of_every_sort() -> None:
    plan = make_plan(ChaosConfig(seed=1), KNOWN)
    options = [script.options for script in plan.scripts]
    assert len({script.label for script in plan.scripts}) == len(options)
    assert {bool(given["temperature"]) for given in options} == {True, False}
    assert {given.get("logprobs") for given in options} == {None, 0, 2}
    assert {"stop" in given for given in options} == {True, False}
    assert {given.get("priority") for given in options} == {None, -10, 10}
    assert any(given["repetition_penalty"] > 1 for given in options)
    beginnings = Counter(tuple(given["token_ids"][:16]) for given in options)
    assert beginnings.most_common(1)[0][1] > 1, "some share a prefix"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"minutes": 0.0}, "minutes"),
        ({"minutes": 10_000.0}, "minutes"),
        ({"prefill": 1}, "prefill"),
        ({"decode": 1}, "decode"),
        ({"seed": -1}, "seed"),
        ({"engine": "model"}, "deterministic"),
        ({"path": "sideways"}, "path"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        ChaosConfig(**settings)  # type: ignore[arg-type]
