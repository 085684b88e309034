"""What is written to a connection with many streams within a burst leaves in few packets, over real sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from baton.rpc.corks import BATCH, WIDE, Corks, find_socket
from tests.rpc.segments import segments_sent
from tests.rpc.waiting import until

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="no corks here")


@pytest.fixture
def corks() -> Iterator[Corks]:
    with ThreadPoolExecutor(1) as executor:
        made = Corks(executor)
        yield made
        assert len(made) == 0, "no connection is kept"


@contextmanager
def pair(family: socket.AddressFamily, host: str) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """A server's and a client's end of a connection, and the client's address as gRPC writes it."""
    with (
        socket.create_server((host, 0), family=family) as listening,
        socket.create_connection(listening.getsockname()[:2]) as client,
        listening.accept()[0] as server,
    ):
        client.settimeout(10.0)
        server.settimeout(10.0)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        name, port = client.getsockname()[:2]
        yield server, client, f"ipv4:{name}:{port}" if family == socket.AF_INET else f"ipv6:%5B{name}%5D:{port}"


def enter(streams: ExitStack, corks: Corks, peer: str, count: int) -> Callable[[], None]:
    """So many streams to the peer; what the last one is to call before a write."""
    for _ in range(count):
        before_write = streams.enter_context(corks.stream(peer))
    return before_write


async def widen(streams: ExitStack, corks: Corks, peer: str) -> Callable[[], None]:
    """As many as it takes for the connection's socket to be sought, and found."""
    before_write = enter(streams, corks, peer, WIDE)
    await until(lambda: corks.found == 1, "the socket is found")
    return before_write


def corked(connected: socket.socket) -> bool:
    return bool(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_socket_is_found_by_its_peer(family: socket.AddressFamily, host: str) -> None:
    with pair(family, host) as (server, client, peer):
        before = descriptors()
        found = find_socket(peer)
        assert found is not None
        with found:
            assert found.fileno() not in (server.fileno(), client.fileno()), "a duplicate"
            assert found.getpeername() == server.getpeername()
            found.send(b"!")
            assert client.recv(1) == b"!"
        assert descriptors() == before
    assert find_socket(peer) is None, "it is closed"


@pytest.mark.parametrize("peer", ["unix:/tmp/some", "unix:", "", "ipv4:", "ipv4:127.0.0.1:none", "ipv6:%5B::1%5D:1"])
def test_nothing_is_found_for_other_peers(peer: str) -> None:
    before = descriptors()
    assert find_socket(peer) is None
    assert descriptors() == before


async def test_corks_are_pulled_every_few_writes_and_at_the_end(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (server, client, peer), ExitStack() as streams:
        before_write = await widen(streams, corks, peer)
        before = segments_sent(server)
        with corks:
            for _ in range(BATCH + 1):
                before_write()
                server.send(b".")
                assert corked(server)
            assert len(client.recv(BATCH, socket.MSG_WAITALL)) == BATCH, "they came before the end"
        assert not corked(server)
        assert len(client.recv(1)) == 1
        assert segments_sent(server) - before < BATCH / 2
        before_write()
        assert not corked(server), "not outside a burst"


async def test_nothing_stays_corked_after_a_fault_in_a_burst(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (server, _, peer), ExitStack() as streams:
        before_write = await widen(streams, corks, peer)

        def fail() -> None:
            before_write()
            assert corked(server)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), corks:
            fail()
        assert not corked(server)


async def test_the_last_stream_may_end_within_a_burst(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (server, _, peer), corks:
        with ExitStack() as streams:
            before_write = await widen(streams, corks, peer)
            before_write()
            assert corked(server)
        assert not corked(server), "nobody would pull it later"


async def test_a_connection_with_few_streams_is_left_alone(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (server, _, peer), ExitStack() as streams:
        before_write = enter(streams, corks, peer, WIDE - 1)
        with corks.stream(peer):
            await until(lambda: corks.found == 1, "the socket is found")
        with corks:
            before_write()
            assert not corked(server), "one stream has ended since"


async def test_a_connection_that_broke_does_no_harm(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (server, client, peer), ExitStack() as streams:
        before_write = await widen(streams, corks, peer)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # with a reset
        with pytest.raises(ConnectionResetError):
            server.recv(1)
        server.close()
        with corks:
            before_write()
            before_write()


async def test_a_stream_may_end_while_its_socket_is_sought(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (_, _, peer):
        before = descriptors()
        with ExitStack() as streams:
            enter(streams, corks, peer, WIDE)
        await until(lambda: descriptors() == before, "the duplicate is closed")
        assert corks.found == 0


async def test_the_duplicate_goes_with_the_last_stream(corks: Corks) -> None:
    with pair(socket.AF_INET, "127.0.0.1") as (_, _, peer):
        before = descriptors()
        with ExitStack() as streams:
            await widen(streams, corks, peer)
            assert descriptors() == before + 1
        assert descriptors() == before
