"""A chaos run from its start to its verdict."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TextIO

from baton.chaos import report
from baton.chaos.aftermath import aftermath
from baton.chaos.config import ChaosConfig
from baton.chaos.harm import KINDS, Harm
from baton.chaos.load import ChaosLoad
from baton.chaos.plan import ChaosPlan, make_plan
from baton.chaos.verdict import Judgement, judge
from baton.client import Client
from baton.launch.cluster import PROGRAM, LocalCluster
from baton.rpc.net import cancelling

Tell = Callable[[str], None]
"""Takes one line of the report."""
ERRORS = 5
"""Lines with errors that are told."""


async def chaos(
    config: ChaosConfig, tell: Tell, *, plan: ChaosPlan | None = None, program: Sequence[str] = PROGRAM
) -> Judgement:
    """Starts a cluster, harms it and judges; no process is left afterwards. `plan` in place of the one that the
    settings make; `program` as in `LocalCluster`.

    Raises ConfigError or Unavailable where the cluster does not start or its router ends, Internal where a stream fails
    before any harm is done.
    """
    plan = plan or make_plan(config, list(KINDS))
    logs = Logs()
    with ExitStack() as stack:
        if config.log is not None:
            logs.file = stack.enter_context(config.log.open("w"))
        async with LocalCluster(config.cluster(), sink=logs.take, program=program) as cluster:
            return await _harmed(cluster, plan, logs, tell)


class Logs:
    """The processes' log lines: to a file, if there is one. `errors` are the first that are errors, each of them a bug
    of a worker or router; `failovers` counts those of a request by its label."""

    def __init__(self) -> None:
        self.file: TextIO | None = None
        self.errors: list[str] = []
        self.failovers: Counter[str] = Counter()

    def take(self, line: str) -> None:
        if self.file is not None:
            print(line, file=self.file)
        if '"level": "error"' in line and len(self.errors) < ERRORS:
            self.errors.append(line)
        if '"event": "failed over"' in line:
            self.failovers[json.loads(line.partition(") ")[2])["request_id"]] += 1


async def _harmed(cluster: LocalCluster, plan: ChaosPlan, logs: Logs, tell: Tell) -> Judgement:
    loop = asyncio.get_running_loop()
    began = loop.time()

    def clock() -> float:
        return loop.time() - began

    for line in report.opening(plan):
        tell(line)
    async with Client(cluster.address) as client:
        expected = await ChaosLoad(client, plan, clock).undisturbed()
        tell(f"{clock():8.2f} s  {len(expected)} undisturbed streams are heard; the harm begins")
        load, over = ChaosLoad(client, plan, clock), asyncio.Event()
        harm = Harm(cluster, client, load, clock, lambda event: tell(report.time_line(event)))
        streams = asyncio.create_task(load.run(over))
        async with cancelling(streams):
            await harm.run(plan)
            over.set()
            await streams
        tell(f"{clock():8.2f} s  the last stream has ended; recounting")
        after = await aftermath(cluster, harm.killed)
        after = replace(after, left=(*after.left, *(f"an error in the log: {line}" for line in logs.errors)))
    judgement = judge(expected, load.courses, harm.happened, list(KINDS), after, logs.failovers)
    for line in report.summary(judgement):
        tell(line)
    return judgement
