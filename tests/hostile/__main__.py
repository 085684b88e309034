"""`python -m tests.hostile [NAME ...]`: the cases whose name contains one of these, all without any."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from tests.hostile import clusters, long_texts
from tests.hostile.rows import Row, lines

CASES: tuple[Callable[[], Awaitable[list[Row]]], ...] = (
    clusters.logits_that_are_not_finite,
    clusters.a_long_model_name,
    clusters.an_impostor,
    clusters.two_containers_of_one_pod,
    clusters.an_empty_pool,
    clusters.a_worker_that_dies_or_stops,
    clusters.a_step_that_spans_a_pause,
    clusters.a_frozen_client,
    clusters.a_suspended_router,
    long_texts.long_texts,
    clusters.a_silent_stream_behind_another_server,
)


async def run(names: list[str]) -> list[Row]:
    rows: list[Row] = []
    for case in CASES:
        title = case.__name__
        if names and not any(name in title for name in names):
            continue
        began = time.monotonic()
        try:
            rows += await case()
        except Exception as error:  # noqa: BLE001  a case that breaks is missed; the others still tell
            rows.append(Row(title, "ends", f"{type(error).__name__}: {error}"[:100], met=False))
        print(f"{title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    rows = asyncio.run(run(sys.argv[1:]))
    print("\n".join(lines(rows)))
    missed = sum(not row.met for row in rows)
    print(f"\n{len(rows) - missed} of {len(rows)} met")
    return 1 if missed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
