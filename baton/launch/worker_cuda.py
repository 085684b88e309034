"""What differs for a worker with its pool in a GPU's memory: which transport fits, and how it orders with compute."""

from __future__ import annotations

from collections.abc import Callable

from baton.config import WorkerConfig
from baton.errors import ConfigError
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.nccl.library import DevicePool, NcclDevice
from kvtransfer.transports.nccl.transport import NcclTransport


def check_device(config: WorkerConfig) -> None:
    """Raises ConfigError, before anything is loaded, where the transport can't move this worker's memory, or what is
    asked for computes on a CPU only."""
    on_gpu = config.device.startswith("cuda")
    if on_gpu or config.transport == "nccl":
        NcclDevice(_index(config.device))
    if config.transport != "auto" and (config.transport == "nccl") != on_gpu:
        moves, pool = ("CUDA", "CPU") if config.transport == "nccl" else ("CPU", "CUDA")
        where = f"with device {config.device} the pool is in {pool} memory"
        raise ConfigError(f"transport {config.transport}: moves {moves} memory, and {where}")
    for field, value in (("kernels", config.kernels), ("weights", config.weights)):
        if on_gpu and value in ("native", "int8", "int4"):
            raise ConfigError(
                f"{field} {value}: the native kernels compute on the CPU, not with device {config.device}"
            )


def nccl_transport(
    config: WorkerConfig,
    pool: DevicePool,
    incarnation: str,
    events: ReceiverEvents | None,
    host: str,
    advertise: str | None,
) -> NcclTransport:
    """The one transport between pools in CUDA memory."""
    device = NcclDevice(_index(config.device))
    fence = _fence(config.device)
    return NcclTransport(pool, incarnation, device, events, host=host, advertise=advertise, fence=fence)


def _fence(device: str) -> Callable[[], object]:
    """Records how far the engine's stream has come: the step that filled a block was issued before its write is."""
    import torch

    stream = torch.cuda.default_stream(torch.device(device))

    def record() -> object:
        return stream.record_event()

    return record


def _index(device: str) -> int:
    number = device.partition(":")[2]
    return int(number) if number.isdecimal() else 0
