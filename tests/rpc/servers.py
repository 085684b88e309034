"""Servers that tests start at once."""

from __future__ import annotations

from collections.abc import Sequence

from baton.rpc.net import Server, Service


async def start_server(listen: str, services: Sequence[Service]) -> Server:
    server = Server(listen)
    await server.start(services)
    return server
