"""Durations in the settings of each process: what is none is refused with the setting's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from baton.bench.schedule.config import LoadConfig
from baton.config import LONGEST_S, RouterConfig, WorkerConfig
from baton.errors import ConfigError
from baton.launch.cluster import ClusterConfig


def a_worker(**settings: Any) -> WorkerConfig:
    return WorkerConfig(roles=frozenset({"prefill"}), **settings)


PROCESSES: dict[type, Callable[..., object]] = {
    RouterConfig: RouterConfig, WorkerConfig: a_worker, ClusterConfig: ClusterConfig, LoadConfig: LoadConfig
}  # fmt: skip
DURATIONS = [
    (kind, field.name, field.default)
    for kind in PROCESSES
    for field in fields(kind)
    if field.name.endswith(("_s", "_ms"))
]


def test_the_durations_are_found() -> None:
    names = {name for _, name, _ in DURATIONS}
    assert {"lease_s", "request_limit_s", "handoff_deadline_s", "start_s", "tpot_budget_ms", "timeout_s"} <= names


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize(("kind", "name", "default"), DURATIONS)
def test_what_is_no_duration_is_refused(kind: type, name: str, default: float, value: float) -> None:
    if value == 0 == default or (value == 0 and name in ("off_s", "warmup_s")):
        PROCESSES[kind](**{name: value})
        return
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        PROCESSES[kind](**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1e10, 1e300])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n, _ in DURATIONS if k is not LoadConfig and n[-3:] != "_ms"])
def test_more_than_a_week_is_refused(kind: type, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must be at most 604800, a week"):
        PROCESSES[kind](**{name: value})
    PROCESSES[kind](**{name: LONGEST_S})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_other_numbers_must_be_finite_too(value: float) -> None:
    with pytest.raises(ConfigError, match=f"^sim_speed: must be a finite number, not {value}"):
        a_worker(engine="simulated", sim_speed=value)
