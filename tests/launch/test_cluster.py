"""The launcher, with stand-ins for the roles: starting, failing, watching, stopping."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from baton.errors import ConfigError, Unavailable
from baton.launch.cluster import STOP_S, ClusterConfig, LocalCluster, core_of, dialable
from tests.launch.processes import wait_gone

PROGRAM = (sys.executable, "-m", "tests.launch.stand_in")
WAIT_S = 10.0


def cluster_of(behaviour: str, lines: list[str] | None = None, **settings: object) -> LocalCluster:
    """Stand-ins whose workers behave so; the router always behaves."""
    config = ClusterConfig(model=behaviour, **settings)  # type: ignore[arg-type]
    said: list[str] = [] if lines is None else lines
    return LocalCluster(config, program=PROGRAM, sink=said.append)


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE}


async def test_it_starts_all_and_leaves_none() -> None:
    before = children()
    async with cluster_of("good", prefill=2, decode=1) as cluster:
        names = [(child.name, child.role) for child in cluster.processes]
        assert names == [
            ("router", "router"),
            ("prefill-0", "prefill"),
            ("prefill-1", "prefill"),
            ("decode-0", "decode"),
        ]
        assert cluster.address == cluster.processes[0].address
        assert all(child.address and child.running for child in cluster.processes)
        assert {child.pid for child in cluster.processes} == children() - before
    assert not any(child.running for child in cluster.processes)
    assert children() == before


async def test_a_failing_worker_is_the_clusters_error_in_its_own_words() -> None:
    lines: list[str] = []
    before = children()
    with pytest.raises(ConfigError, match=r"^(prefill|decode)-0: model\.gguf: truncated$"):
        async with cluster_of("corrupt", lines):
            raise AssertionError("it must not start")
    assert children() == before
    assert {"(prefill-0) something else", "(decode-0) something else"} & set(lines)
    assert not any("truncated" in line for line in lines), "said once, by the exception"


async def test_flags_are_every_workers_but_for_those_that_name_a_role() -> None:
    lines: list[str] = []
    settings = {"weights": "int8", "decode_weights": "int4", "kv_dtype": "int8", "kernels": "native"}
    async with cluster_of("parent", lines, **settings):
        async with asyncio.timeout(WAIT_S):
            while len(lines) < 2:
                await asyncio.sleep(0.01)
    said = {line.split(")")[0].strip("("): line for line in lines}
    for name, weights in (("prefill-0", "int8"), ("decode-0", "int4")):
        assert f"--weights {weights}" in said[name]
        assert "--kernels native --kv-dtype int8" in said[name]
        assert ("--max-sequences 64 --tpot-budget-ms 0.0" in said[name]) is (name == "decode-0")


@pytest.mark.parametrize("field", ["kernels", "weights", "prefill_weights", "decode_weights", "kv_dtype"])
def test_a_format_that_there_is_not_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: auto, .*, not 'int3'$"):
        ClusterConfig(**{field: "int3"})  # type: ignore[arg-type]


async def test_a_crash_names_the_signal() -> None:
    with pytest.raises(Unavailable, match="was killed by SIGKILL"):
        async with cluster_of("crash"):
            raise AssertionError("it must not start")


async def test_who_is_never_ready_is_named_at_the_deadline() -> None:
    before = children()
    with pytest.raises(Unavailable, match=r"^prefill-0, decode-0 not ready within 1 s$"):
        async with cluster_of("silent", start_s=1.0):
            raise AssertionError("it must not start")
    assert children() == before


async def test_cancelling_the_start_leaves_none() -> None:
    before = children()

    async def enter() -> None:
        async with cluster_of("silent"):
            raise AssertionError("it must not start")

    task = asyncio.create_task(enter())
    async with asyncio.timeout(WAIT_S):
        while len(children()) < len(before) + 3:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


async def test_what_ignores_sigterm_is_killed() -> None:
    lines: list[str] = []
    async with cluster_of("stubborn", lines) as cluster:
        began = time.monotonic()
    assert STOP_S <= time.monotonic() - began < STOP_S + 2
    assert not any(child.running for child in cluster.processes)
    assert any("killed what did not stop" in line and "prefill-0, decode-0" in line for line in lines)


async def test_a_dead_worker_is_reported_and_the_others_go_on() -> None:
    lines: list[str] = []
    reported = asyncio.Event()

    def sink(line: str) -> None:
        lines.append(line)
        reported.set()

    async with LocalCluster(ClusterConfig(model="good"), program=PROGRAM, sink=sink) as cluster:
        victim = cluster.processes[1]
        os.kill(victim.pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            await reported.wait()
        assert lines == [f"baton: prefill-0 (pid {victim.pid}) was killed by SIGKILL; it is not started again"]
        assert [child.running for child in cluster.processes] == [True, False, True]


async def test_a_worker_that_is_added_ends_with_the_others() -> None:
    before = children()
    lines: list[str] = []
    async with cluster_of("parent", lines) as cluster:
        added = await cluster.add("decode-1", "decode")
        assert cluster.processes[-1] is added
        assert added.address
        assert added.running
        async with asyncio.timeout(WAIT_S):
            while not any(line.startswith("(decode-1)") for line in lines):
                await asyncio.sleep(0.01)
        assert "--max-sequences 64" in next(line for line in lines if line.startswith("(decode-1)"))
    assert children() == before


async def test_a_worker_that_is_added_and_fails_says_why() -> None:
    async with cluster_of("good") as cluster:
        cluster.config = ClusterConfig(model="corrupt")
        with pytest.raises(ConfigError, match=r"^decode-1: model\.gguf: truncated$"):
            await cluster.add("decode-1", "decode")


async def test_the_routers_death_ends_the_cluster() -> None:
    async with cluster_of("good") as cluster:
        os.kill(cluster.processes[0].pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="the router was killed by SIGKILL"):
            async with asyncio.timeout(WAIT_S):
                await cluster.wait()


async def test_much_output_blocks_nobody_and_arrives() -> None:
    lines: list[str] = []
    async with cluster_of("chatty", lines) as cluster:
        assert all(child.address for child in cluster.processes)
    assert lines.count("(decode-0) line 19999") == 1


async def test_children_have_their_own_group_and_flags() -> None:
    lines: list[str] = []
    async with cluster_of("parent", lines, pin=True, chunk_tokens=33) as cluster:
        router = cluster.address
    (said,) = [line for line in lines if line.startswith("(decode-0)")]
    assert "own group: True; parent's session: True" in said
    assert f"--router {router}" in said
    assert "--chunk-tokens 33" in said
    assert f"--pin {max(os.sched_getaffinity(0))}" in said


@pytest.mark.parametrize("behaviour", ["good", "stubborn"])
def test_killing_the_owner_kills_them_all(behaviour: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.parent", behaviour], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 4
        owner.kill()
    assert wait_gone(pids) == []


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prefill": 0}, "prefill"),
        ({"decode": -1}, "decode"),
        ({"listen": "9700"}, "listen"),
        ({"start_s": 0.0}, "start_s"),
        ({"pin": True, "threads": 2}, "threads"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        ClusterConfig(**settings)  # type: ignore[arg-type]


def test_prefill_takes_the_first_cores_and_decode_the_last() -> None:
    cores = [0, 1, 2, 3]
    assert [core_of("prefill", index, cores) for index in range(5)] == [0, 1, 2, 3, 0]
    assert [core_of("decode", index, cores) for index in range(5)] == [3, 2, 1, 0, 3]


def test_a_wildcard_is_reached_through_loopback() -> None:
    assert dialable("0.0.0.0:5") == "127.0.0.1:5"
    assert dialable("[::]:5") == "[::1]:5"
    assert dialable("10.0.0.1:5") == "10.0.0.1:5"
