"""TLS, several connections, and where a receiver listens."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from baton.errors import ConfigError, DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.sockets import split_endpoint
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.tls import TlsContexts
from kvtransfer.transports.tcp.writer import ParallelChannel, TcpWriter
from tests.kvtransfer.transports.harness import GENEROUS, Recorder, host_and_port
from tests.kvtransfer.transports.patterns import fill, pattern

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")  # 16 KiB a block
PEER = ProcessRef("receiver", "r", "")


def soon() -> float:
    return time.monotonic() + GENEROUS


def contexts(folder: Path, authority: trustme.CA, name: str) -> TlsContexts:
    issued = authority.issue_cert(name)
    cert, key, ca = (str(folder / f"{name}.{kind}") for kind in ("cert", "key", "ca"))
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    return TlsContexts.load(cert, key, ca)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsContexts:
    return contexts(tmp_path_factory.mktemp("tls"), trustme.CA(), "worker.test")


class Pair:
    """A receiver, and a pool to write from."""

    def __init__(self, tls: TlsContexts | None, **options: str | int) -> None:
        self.events = Recorder()
        self.memory, self.source = PoolMemory(LAYOUT, 300), PoolMemory(LAYOUT, 300, shared=False)
        fill(self.source, 1)
        self.receiver = TcpReceiver(self.memory, self.events, checksums=True, tls=tls, **options)  # type: ignore[arg-type]

    def ticket(self, blocks: int) -> Ticket:
        ticket = Ticket(HandoffKey(os.urandom(16), 1), 3, os.urandom(16), tuple(range(blocks)), 0, "w")
        self.receiver.admit(ticket)
        return ticket

    def writer(self, tls: TlsContexts | None, connections: int = 1) -> TcpWriter:
        return TcpWriter(self.source, checksums=True, tls=tls, connections=connections)

    def intact(self, blocks: int) -> bool:
        return all(bytes(self.memory.block(i)) == pattern(1, 299 - i, LAYOUT.block_bytes) for i in range(blocks))

    def close(self) -> None:
        self.receiver.close()
        self.memory.close()
        self.source.close()


@pytest.fixture
def plain(nothing_left: None) -> Iterator[Pair]:
    pair = Pair(None)
    yield pair
    pair.close()


@pytest.fixture
def secret(nothing_left: None, tls: TlsContexts) -> Iterator[Pair]:
    pair = Pair(tls)
    yield pair
    pair.close()


def reversed_moves(blocks: int) -> list[BlockMove]:
    return [BlockMove(299 - i, i, i) for i in range(blocks)]


@pytest.mark.parametrize("connections", [1, 3])
def test_blocks_arrive_under_tls(secret: Pair, tls: TlsContexts, connections: int) -> None:
    channel = secret.writer(tls, connections).connect(secret.receiver.endpoint(), PEER, soon())
    ticket = secret.ticket(300)
    assert channel.write(ticket, reversed_moves(300), soon()).bytes == 300 * LAYOUT.block_bytes
    assert secret.intact(300)
    channel.close()


def test_nothing_readable_travels_under_tls(secret: Pair, tls: TlsContexts) -> None:
    """A relay keeps what it sees."""
    token = secret.receiver.endpoint().partition("#")[2]
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def relay() -> None:
            with server.accept()[0] as near, socket.create_connection(host_and_port(secret.receiver), GENEROUS) as far:
                back = threading.Thread(target=pass_on, args=(far, near, bytearray()))
                back.start()
                pass_on(near, far, seen)
                far.shutdown(socket.SHUT_WR)
                back.join(GENEROUS)

        thread = threading.Thread(target=relay)
        thread.start()
        channel = secret.writer(tls).connect(f"127.0.0.1:{server.getsockname()[1]}#{token}", PEER, soon())
        ticket = secret.ticket(4)
        channel.write(ticket, reversed_moves(4), soon())
        channel.close()
        thread.join(GENEROUS)
    assert len(seen) > 4 * LAYOUT.block_bytes
    assert ticket.write_token not in seen
    assert bytes.fromhex(token) not in seen
    assert pattern(1, 299, LAYOUT.block_bytes)[:64] not in seen


def pass_on(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    while data := source.recv(65536):
        seen += data
        target.sendall(data)


def test_one_end_without_tls_is_named(plain: Pair, secret: Pair, tls: TlsContexts) -> None:
    with pytest.raises(Mismatch, match="tls differs: here on, there off"):
        plain.writer(tls).connect(plain.receiver.endpoint(), PEER, soon())
    with pytest.raises(Mismatch, match="tls differs: here off, there on"):
        secret.writer(None).connect(secret.receiver.endpoint(), PEER, soon())


def test_a_certificate_of_another_authority_gets_nothing(secret: Pair, tmp_path: Path) -> None:
    stranger = contexts(tmp_path, trustme.CA(), "stranger.test")
    with pytest.raises(PeerClosed):
        secret.writer(stranger).connect(secret.receiver.endpoint(), PEER, soon())
    assert secret.events.landings == []


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tcp_tls_ca"):
        TlsContexts.load("no", "no", str(tmp_path / "missing"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    with pytest.raises(ConfigError, match="tcp_tls_cert"):
        TlsContexts.load(str(tmp_path / "ca"), str(tmp_path / "ca"), str(tmp_path / "ca"))


@pytest.mark.parametrize("blocks", [1, 2, 3, 10])
def test_a_write_is_shared_out(plain: Pair, blocks: int) -> None:
    channel = plain.writer(None, 3).connect(plain.receiver.endpoint(), PEER, soon())
    assert isinstance(channel, ParallelChannel)
    ticket = plain.ticket(blocks)
    assert channel.write(ticket, reversed_moves(blocks), soon()).bytes == blocks * LAYOUT.block_bytes
    assert len(plain.events.landings) == min(blocks, 3)
    assert plain.intact(blocks)
    assert channel.write(ticket, [], soon()).bytes == 0
    channel.close()
    with pytest.raises((PeerClosed, RuntimeError)):
        channel.write(ticket, reversed_moves(blocks), soon())


def test_a_refused_share_leaves_the_channel_good(plain: Pair) -> None:
    channel = plain.writer(None, 2).connect(plain.receiver.endpoint(), PEER, soon())
    ticket = plain.ticket(4)
    plain.receiver.revoke(ticket.key)
    plain.events.wait(lambda e: e.revocations == [ticket.key])
    with pytest.raises(WriteRefused):
        channel.write(ticket, reversed_moves(4), soon())
    assert channel.write(other := plain.ticket(4), reversed_moves(4), soon()).bytes == 4 * LAYOUT.block_bytes
    assert plain.events.landed_indices(other.key) == {0, 1, 2, 3}
    channel.close()


def test_a_share_that_ends_ends_all(plain: Pair) -> None:
    channel = plain.writer(None, 2).connect(plain.receiver.endpoint(), PEER, soon())
    plain.events.flowing.clear()
    started = time.monotonic()
    with pytest.raises((DeadlineExceeded, PeerClosed)):
        channel.write(plain.ticket(4), reversed_moves(4), time.monotonic() + 0.5)
    assert time.monotonic() - started < 30
    plain.events.flowing.set()
    channel.close()


def test_a_port_of_its_own_and_another_to_be_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pair = Pair(None, port=port)
    assert split_endpoint(pair.receiver.endpoint())[0] == f"127.0.0.1:{port}"
    pair.close()
    pair = Pair(None, host="0.0.0.0", advertise="127.0.0.1", advertise_port=9)
    assert split_endpoint(pair.receiver.endpoint())[0] == "127.0.0.1:9"
    pair.close()
