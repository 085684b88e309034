"""Nothing is left behind by a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.rpc.waiting import until


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()}, "no task left")
