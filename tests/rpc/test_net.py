"""Addresses and servers."""

from __future__ import annotations

import socket

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import ConfigError
from baton.rpc import net
from baton.rpc.net import format_address, listens, open_channel, parse_address
from tests.rpc.servers import start_server


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80),
        ("localhost:0", "localhost", 0),
        ("[::1]:9700", "::1", 9700),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("a.b-c.example:65535", "a.b-c.example", 65535),
    ],
)
def test_an_address_is_read_and_written_the_same(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert format_address(host, port) == text


@pytest.mark.parametrize("text", ["", "host", ":80", "h:", "h:-1", "h:x", "h:65536", "::1:80", "::1", "h:²"])
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="router: expected HOST:PORT") as caught:
        parse_address(text, "router")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_an_occupied_port_is_one_line(host: str) -> None:
    server = await start_server(f"{host}:0", [])
    try:
        assert server.address.startswith(host)
        with pytest.raises(ConfigError) as caught:
            await start_server(server.address, [])
        assert str(caught.value) == f"cannot listen on {server.address}: address already in use"
    finally:
        await server.stop(0)
    again = await start_server(server.address, [])  # free at once
    await again.stop(0)


@pytest.mark.parametrize("listen", ["192.0.2.1:0", "no-such-host.invalid:0", f"{'a' * 70}:0"])
async def test_an_address_of_another_machine_is_refused_in_one_line(listen: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on") as caught:
        await start_server(listen, [])
    assert "\n" not in str(caught.value)


async def test_a_peer_listens_until_its_server_stops() -> None:
    server = await start_server("127.0.0.1:0", [])
    assert await listens(server.address)
    await server.stop(0)
    assert not await listens(server.address)
    assert await listens(f"{'a' * 70}:1")  # not certain, so not gone


async def test_a_peer_that_does_not_answer_may_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # bound and full: further connections are left without an answer
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        where = silent.getsockname()
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(where)
        assert await listens(f"127.0.0.1:{where[1]}", 0.1)
        for filler in fillers:
            filler.close()


async def test_health_follows_readiness() -> None:
    server = await start_server("127.0.0.1:0", [])
    try:
        async with open_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def status(service: str) -> int:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                return int(answer.status)

            names, serving, not_serving = ("", net.READINESS, net.LIVENESS), 1, 2
            assert [await status(name) for name in names] == [not_serving, not_serving, serving]
            await server.set_ready(True)
            assert [await status(name) for name in names] == [serving] * 3
    finally:
        await server.stop(0)
