"""Transports as settings ask for them, between real workers: what arrives, and what the timeline says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import trustme

from baton.config import RoleName
from kvtransfer.blocks.layout import KvLayout
from tests.cluster.conftest import prompt_of, running, settled
from tests.kvtransfer.conftest import needs_nixl

BLOCK = KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16").block_bytes
PROMPT = 40 * 16 + 5


def certificates(folder: Path) -> list[str]:
    authority = trustme.CA()
    issued = authority.issue_cert("worker.test")
    files = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    authority.cert_pem.write_to_path(files["ca"])
    return [word for name, path in files.items() for word in (f"--tcp-tls-{name}", path)]


async def check(transport: str, *flags: str, role_flags: Mapping[RoleName, Sequence[str]] | None = None) -> None:
    """Each block is sent once, and what the decode worker holds already is not sent again."""
    async with running(*flags, role_flags=role_flags, transport=transport, dtype="bfloat16") as cluster:
        first = await cluster.client.complete(token_ids=prompt_of(PROMPT), max_tokens=4, ignore_eos=True, timeout=60)
        again = await cluster.client.complete(token_ids=prompt_of(PROMPT), max_tokens=4, ignore_eos=True, timeout=60)
        for completion, sent in ((first, 41), (again, 1)):
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
    own: dict[RoleName, list[str]] = {
        "prefill": ["--tcp-connections", "3"],
        "decode": ["--tcp-listen", "[::1]:0"],
    }
    await check("tcp", "--checksums", *certificates(tmp_path), role_flags=own)


@needs_nixl
@pytest.mark.asyncio
async def test_nixl() -> None:
    await check("nixl", "--checksums")
