"""A process that owns a cluster of stand-ins, prints their process ids and waits to be killed."""

from __future__ import annotations

import asyncio
import sys

from baton.launch.cluster import ClusterConfig, LocalCluster


async def main() -> None:
    program = (sys.executable, "-m", "tests.launch.stand_in")
    async with LocalCluster(ClusterConfig(model=sys.argv[1], decode=2), program=program) as cluster:
        print(*(child.pid for child in cluster.processes), flush=True)
        await cluster.wait()


asyncio.run(main())
