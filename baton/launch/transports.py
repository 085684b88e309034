"""The transports that a worker's settings ask for, best first: receivers for its decode role, writers for its prefill
role. With a pool in a GPU's memory `nccl` is the only one, and its issuer is shared by both."""

from __future__ import annotations

from collections.abc import Callable

from baton.config import WorkerConfig
from baton.errors import ConfigError
from baton.launch.worker_load import block_copy
from baton.rpc.net import parse_address
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import Receiver, ReceiverEvents, Writer
from kvtransfer.transports.nccl.issuer import Issuer
from kvtransfer.transports.nccl.library import DevicePool, NcclDevice
from kvtransfer.transports.nccl.receiver import NcclReceiver
from kvtransfer.transports.nccl.writer import NcclWriter
from kvtransfer.transports.nixl.receiver import NixlReceiver
from kvtransfer.transports.nixl.writer import NixlWriter
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.shm.writer import ShmWriter
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.tls import TlsContexts
from kvtransfer.transports.tcp.writer import TcpWriter


def receivers(
    config: WorkerConfig, memory: PoolMemory | DevicePool, events: ReceiverEvents, issuer: Issuer | None
) -> dict[str, Receiver]:
    """By kind. Raises ConfigError."""
    host, _ = parse_address(config.listen, "listen")
    advertise = parse_address(config.advertise, "advertise")[0] if config.advertise else None
    if isinstance(memory, DevicePool):
        assert issuer is not None, "a pool on a device has an issuer"
        return {"nccl": NcclReceiver(memory, events, issuer, host=host, advertise=advertise)}
    made: dict[str, Receiver] = {}
    if config.transport in ("auto", "shm"):
        made["shm"] = ShmReceiver(memory, events, config.checksums)
    if config.transport == "nixl":  # only where it is asked for: without RDMA hardware ours are faster
        made["nixl"] = NixlReceiver(memory, events, host=host, advertise=advertise, checksums=config.checksums)
    if config.transport in ("auto", "tcp"):
        port = advertise_port = 0
        if config.tcp_listen:
            host, port = parse_address(config.tcp_listen, "tcp_listen")
        if config.tcp_advertise:
            advertise, advertise_port = parse_address(config.tcp_advertise, "tcp_advertise")
        made["tcp"] = TcpReceiver(
            memory,
            events,
            host=host,
            port=port,
            advertise=advertise,
            advertise_port=advertise_port,
            checksums=config.checksums,
            tls=_tls(config),
        )
    return made


def writers(
    config: WorkerConfig, memory: PoolMemory | DevicePool, incarnation: str, issuer: Issuer | None
) -> dict[str, Writer]:
    """By kind, for the process of this incarnation. Raises ConfigError."""
    if isinstance(memory, DevicePool):
        assert issuer is not None, "a pool on a device has an issuer"
        return {"nccl": NcclWriter(memory, incarnation, issuer, _fence(config.device))}
    made: dict[str, Writer] = {}
    if config.transport in ("auto", "shm"):
        made["shm"] = ShmWriter(memory, incarnation, block_copy(config.kernels), config.checksums)
    if config.transport == "nixl":
        made["nixl"] = NixlWriter(memory, incarnation, checksums=config.checksums)
    if config.transport in ("auto", "tcp"):
        made["tcp"] = TcpWriter(
            memory, checksums=config.checksums, tls=_tls(config), connections=config.tcp_connections
        )
    return made


def device_issuer(config: WorkerConfig, memory: PoolMemory | DevicePool) -> Issuer | None:
    """The one thread that calls NCCL, to be closed after the receivers and writers; None for a pool in host memory."""
    return Issuer(NcclDevice(_index(config.device))) if isinstance(memory, DevicePool) else None


def check_device(config: WorkerConfig) -> None:
    """Raises ConfigError, before the model is loaded, for a malformed address, a transport that can't move this
    worker's memory, or a setting that needs a CPU."""
    on_gpu = config.device.startswith("cuda")
    if on_gpu or config.transport == "nccl":
        NcclDevice(_index(config.device))
    if config.transport != "auto" and (config.transport == "nccl") != on_gpu:
        moves, pool = ("CUDA", "CPU") if config.transport == "nccl" else ("CPU", "CUDA")
        where = f"with device {config.device} the pool is in {pool} memory"
        raise ConfigError(f"transport {config.transport}: moves {moves} memory, and {where}")
    for field, value in (("tcp_listen", config.tcp_listen), ("tcp_advertise", config.tcp_advertise)):
        if value:
            parse_address(value, field)
    for field, value in (("kernels", config.kernels), ("weights", config.weights)):
        if on_gpu and value in ("native", "int8", "int4"):
            where = f"the native kernels compute on the CPU, not with device {config.device}"
            raise ConfigError(f"{field} {value}: {where}")


def _tls(config: WorkerConfig) -> TlsContexts | None:
    return TlsContexts.load(config.tcp_tls_cert, config.tcp_tls_key, config.tcp_tls_ca) if config.tcp_tls else None


def _fence(device: str) -> Callable[[], object]:
    """Records the position of the engine's stream: the step that filled a block was issued before its write."""
    import torch

    return torch.cuda.default_stream(torch.device(device)).record_event


def _index(device: str) -> int:
    number = device.partition(":")[2]
    return int(number) if number.isdecimal() else 0
