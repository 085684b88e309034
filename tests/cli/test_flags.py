"""Flags made from settings: each under a heading, and each role with those that its code reads."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from cyclopts import App

from baton.cli import main
from baton.cli.app import app
from baton.cli.flags import ProcessFlags
from baton.config import GROUPS, RoleName, RouterConfig, WorkerConfig, marks_of, settings_of
from baton.launch.cluster import ClusterConfig
from baton.launch.worker import run

ROLES: tuple[RoleName, RoleName] = ("prefill", "decode")
ONE_SIDED = {"tcp_listen", "tcp_advertise", "tcp_connections", "max_sequences"}
"""Read on both sides, but without effect on one: only a decode worker is written to or holds sequences, and only a
prefill worker connects."""


def headings_of(command: str) -> dict[str, str]:
    """The flags of a command by the names of their fields, and the heading of each."""
    found: App = app[command]
    shown = [argument for argument in found.assemble_argument_collection() if argument.show]
    groups: list[tuple[str, Any]] = [(argument.field_info.name, argument.parameter.group) for argument in shown]
    return {name: group.name for name, (group,) in groups}


def own(role: RoleName) -> set[str]:
    """The settings of one role alone."""
    (other,) = {*ROLES} - {role}
    return {*settings_of(WorkerConfig, role)} - {*settings_of(WorkerConfig, other)}


@pytest.mark.parametrize("config", [RouterConfig, WorkerConfig, ClusterConfig, ProcessFlags])
def test_every_setting_has_one_group(config: type) -> None:
    hints = get_type_hints(config, include_extras=True)
    marks = {field.name: marks_of(hints[field.name]) for field in fields(config) if field.name != "roles"}
    assert {name: len(found) for name, found in marks.items()} == dict.fromkeys(marks, 1)
    assert {mark.group for found in marks.values() for mark in found} <= {*GROUPS}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_the_flags_of_its_settings_under_their_headings(role: RoleName) -> None:
    hints = get_type_hints(WorkerConfig, include_extras=True)
    process = dict.fromkeys((field.name for field in fields(ProcessFlags)), "Process")
    wanted = {name: marks_of(hints[name])[0].group for name in settings_of(WorkerConfig, role)}
    assert headings_of(role) == wanted | process


@pytest.mark.parametrize("role", ROLES)
def test_the_other_roles_flags_are_unknown(role: RoleName, capsys: pytest.CaptureFixture[str]) -> None:
    (other,) = {*ROLES} - {role}
    for name in own(other):
        flag = f"--{name.replace('_', '-')}"
        assert main([role, flag, "1"]) == 2
        assert f"Unknown option: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("role", ROLES)
async def test_a_roles_own_settings_are_those_that_it_reads(role: RoleName, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()

    class Watched(WorkerConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the worker sets it
    monkeypatch.setattr("baton.rpc.collector.settle", lambda: None)
    settings: dict[str, Any] = {"engine": "simulated", "model": "bytes", "cost_model": "instant", "transport": "tcp"}
    config = Watched(roles=frozenset({role}), router="127.0.0.1:1", tcp_listen="127.0.0.1:0", **settings)
    read.clear()  # the checks read all of them
    stop = asyncio.Event()
    stop.set()
    await run(config, on_ready=lambda _: None, stop=stop)
    (other,) = {*ROLES} - {role}
    assert own(role) <= read
    assert read & own(other) <= ONE_SIDED
