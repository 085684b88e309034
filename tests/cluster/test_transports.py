"""Transports as settings ask for them, between real workers: what arrives, and what the timeline says of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import trustme

from kvtransfer.blocks.layout import KvLayout
from tests.cluster.conftest import prompt_of, running, settled
from tests.cluster.reference import NEAR_IN_BF16, assert_greedy
from tests.kvtransfer.conftest import needs_nixl

BLOCK = KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16").block_bytes
PROMPT, OUTPUT = 40 * 16 + 5, 16


def certificates(folder: Path) -> list[str]:
    authority = trustme.CA()
    issued = authority.issue_cert("worker.test")
    files = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    authority.cert_pem.write_to_path(files["ca"])
    return [word for name, path in files.items() for word in (f"--tcp-tls-{name}", path)]


async def check(transport: str, *flags: str) -> None:
    """Each block is sent once, what the decode worker holds already is not sent again, and what is read from the blocks
    is what was written."""
    async with running(*flags, transport=transport, dtype="bfloat16") as cluster:
        first, again = [
            await cluster.client.complete(
                token_ids=prompt_of(PROMPT), temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, timeout=60
            )
            for _ in range(2)
        ]
        for completion, sent in ((first, 41), (again, 1)):
            await asyncio.to_thread(assert_greedy, prompt_of(PROMPT), completion.token_ids, NEAR_IN_BF16)
            timeline = completion.finished.timeline
            assert timeline.transport == transport
            assert (timeline.transfer_blocks, timeline.transfer_cached_blocks) == (sent, 41 - sent)
            assert timeline.transfer_bytes == sent * BLOCK
            assert timeline.transfer_ms is not None
            assert timeline.transfer_exposed_ms is not None
            assert timeline.transfer_ms > 0
            assert timeline.transfer_exposed_ms <= timeline.total_ms
        pairs = {worker.name: worker.load.pairs for worker in await cluster.client.workers()}
        assert pairs == {"prefill-0": {transport: 1}, "decode-0": {}}
        (pair,) = (pair for status in await cluster.statuses() for pair in status.pairs)
        assert (pair.peer, pair.transport, pair.handoffs) == ("decode-0", transport, 0)
        await settled(cluster)


@pytest.mark.asyncio
async def test_tcp_with_all_that_it_can_do(tmp_path: Path) -> None:
    await check("tcp", "--checksums", "--tcp-connections", "3", "--tcp-listen", "[::1]:0", *certificates(tmp_path))


@needs_nixl
@pytest.mark.asyncio
async def test_nixl() -> None:
    await check("nixl", "--checksums")
