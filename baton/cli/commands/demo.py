"""`baton demo`: a cluster of one prefill and one decode worker answers three prompts at once."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass

from rich.text import Text

from baton.cli.commands.up import fetch
from baton.cli.flags import as_flags, run
from baton.cli.output import console
from baton.cli.picture import Picture
from baton.client import Client, Completion
from baton.config import PathChoice
from baton.launch.cluster import ClusterConfig, LocalCluster

QUESTIONS = ("What is the capital of France?", "What is the chemical symbol for water?", "What is 2 + 2?")
MAX_TOKENS = 64
ANSWER_S = 120.0


@as_flags({"model", "transport", "kernels", "weights", "kv_dtype"})
@dataclass(frozen=True, kw_only=True)
class DemoFlags(ClusterConfig):
    """The demo's cluster."""

    path: PathChoice = "disaggregated"  # adaptively, a prompt may take the shorter way
    listen: str = "127.0.0.1:0"


def demo(*, config: DemoFlags = DemoFlags()) -> None:
    """Show it all: start one prefill and one decode worker, answer three prompts at once, draw where the time went."""
    name = fetch(config.model)
    run(lambda: _show(config, name))


async def _show(config: ClusterConfig, name: str) -> None:
    screen = console(sys.stdout)
    screen.print(f"Starting a router, a prefill worker and a decode worker with {name} ...")
    began = time.monotonic()
    async with LocalCluster(config) as cluster:
        screen.print(f"Ready at {cluster.address} after {time.monotonic() - began:.1f} s; three prompts at once:")
        for question, answer in zip(QUESTIONS, await _ask(cluster.address), strict=True):
            screen.print()
            screen.print(Text(question, style="bold"))
            screen.print(Text(answer.text.strip()))
            screen.print(Picture(answer.finished))
    screen.print()
    screen.print("Stopped. Start one to keep with: baton up --prefill 1 --decode 1")


async def _ask(address: str) -> list[Completion]:
    """Greedy, so that every run gets the same answers. Raises the first failure."""
    async with Client(address) as client:
        return await asyncio.gather(
            *(
                client.complete(messages=[("user", question)], temperature=0.0, max_tokens=MAX_TOKENS, timeout=ANSWER_S)
                for question in QUESTIONS
            )
        )
