"""The seam over the real libraries: NCCL by `nccl4py`, CUDA's runtime by `cuda-python`; both are the extra `[cuda]`.

Communicators are non-blocking, so that an abort is safe. After a group is posted its communicator is in progress until
the launch is done; only then may the stream get an event, which `poll` queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from baton.errors import ConfigError
from baton.model import KvLayout
from kvtransfer.transports.nccl.seam import RECEIVER, UNIQUE_ID_BYTES, CommunicatorError, Span

EXTRA = "nccl4py, nvidia-nccl-cu12 and cuda-python, the extra [cuda]"
MAX_CTAS = 8  # multiprocessors that a communicator's kernel takes from compute, at most


@dataclass(frozen=True, slots=True)
class DevicePool:
    """A KV pool in a device's memory; implements `BlockMemory`. Owned by the engine that allocated it."""

    layout: KvLayout
    blocks: int
    address: int

    @property
    def bytes(self) -> int:
        return self.blocks * self.layout.block_bytes


class NcclDevice:
    """Implements `Device` for CUDA device `index`. Raises `ConfigError`, in one line, without the packages, without
    a driver or without that device."""

    def __init__(self, index: int = 0) -> None:
        self._nccl, self._cuda = _import()
        self._index = index
        cuda = self._cuda
        error, devices = cuda.cudaGetDeviceCount()
        if error != cuda.cudaError_t.cudaSuccess:
            version = cuda.cudaDriverGetVersion()[1]
            why = _text(cuda, error) if version else "no NVIDIA driver is installed"
            raise ConfigError(f"transport nccl: needs a CUDA device: {why}")
        if not 0 <= index < devices:
            raise ConfigError(f"transport nccl: there is no CUDA device {index}, of {devices}")

    def mint(self) -> bytes:
        return mint(self._nccl)

    def open(self, unique_id: bytes, rank: int) -> NcclCommunicator:
        _checked(self._cuda, self._cuda.cudaSetDevice(self._index))
        return NcclCommunicator(self._nccl, self._cuda, unique_id, rank)


class NcclCommunicator:
    """Implements `Communicator`, on the device that is current on the calling thread."""

    def __init__(self, nccl: ModuleType, cuda: ModuleType, unique_id: bytes, rank: int) -> None:
        self._nccl = nccl
        self._cuda = cuda
        self._rank = rank
        self._launched = False  # a group is posted, and the event not yet recorded behind it
        (self._stream,) = _checked(cuda, cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        (self._event,) = _checked(cuda, cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
        config = nccl.Config()
        config.blocking = 0
        config.max_ctas = MAX_CTAS
        try:
            self._comm = nccl.comm_init_rank_config(2, nccl.UniqueId.from_buffer(unique_id), rank, config)
        except (nccl.NCCLError, ValueError) as error:
            self._free()
            raise CommunicatorError(str(error)) from error

    def post(self, group: Sequence[Span], fence: object | None) -> None:
        nccl, cuda = self._nccl, self._cuda
        if fence is not None:  # as `torch.cuda.Event`; its handle is valid at least until the batch is posted
            event = cuda.cudaEvent_t(cast(Any, fence).cuda_event)
            _checked(cuda, cuda.cudaStreamWaitEvent(self._stream, event, 0))
        move, peer = (nccl.recv, 1) if self._rank == RECEIVER else (nccl.send, 0)
        kind, stream = int(nccl.DataType.Uint8), int(self._stream)
        try:
            nccl.group_start()
            try:
                for span in group:
                    move(span.address, span.bytes, kind, peer, self._comm, stream)
            finally:
                nccl.group_end()
        except nccl.NCCLError as error:
            raise CommunicatorError(str(error)) from error
        self._launched = True

    def poll(self) -> bool:
        nccl, cuda = self._nccl, self._cuda
        try:
            state = nccl.comm_get_async_error(self._comm)
        except nccl.NCCLError as error:
            raise CommunicatorError(str(error)) from error
        if state == nccl.Result.InProgress:
            return False
        if state != nccl.Result.Success:
            raise CommunicatorError(f"{nccl.get_error_string(int(state))}: {nccl.get_last_error(self._comm)}")
        if self._launched:
            _checked(cuda, cuda.cudaEventRecord(self._event, self._stream))
            self._launched = False
        return self._passed(cuda.cudaEventQuery(self._event))

    def abort(self) -> None:
        try:
            self._nccl.comm_abort(self._comm)
        except self._nccl.NCCLError as error:
            raise CommunicatorError(str(error)) from error

    def drained(self) -> bool:
        if not self._passed(self._cuda.cudaStreamQuery(self._stream)):
            return False
        self._free()
        return True

    def _passed(self, answer: tuple[Any, ...]) -> bool:
        if answer[0] == self._cuda.cudaError_t.cudaErrorNotReady:
            return False
        _checked(self._cuda, answer)
        return True

    def _free(self) -> None:
        self._cuda.cudaEventDestroy(self._event)
        self._cuda.cudaStreamDestroy(self._stream)


def version() -> tuple[int, int, int]:
    """Of the NCCL library that is loaded. Raises `ConfigError` without the packages."""
    packed = _import()[0].get_version()
    return packed // 10_000, packed // 100 % 100, packed % 100


def mint(nccl: ModuleType | None = None) -> bytes:
    """A unique id; works without a device. Each one leaves a listening socket and a thread in this process."""
    library = nccl or _import()[0]
    try:
        unique_id = bytes(library.get_unique_id())
    except library.NCCLError as error:
        raise CommunicatorError(str(error)) from error
    assert len(unique_id) == UNIQUE_ID_BYTES
    return unique_id


def _import() -> tuple[ModuleType, ModuleType]:
    """nccl4py's bindings and CUDA's runtime. Only here, so that no other process needs the packages."""
    try:
        from cuda.bindings import runtime
        from nccl.bindings import nccl

        nccl.get_version()  # loads the library
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"transport nccl: needs {EXTRA}: {error}") from None
    return nccl, runtime


def _checked(cuda: ModuleType, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The runtime's answer without its status. Raises `CommunicatorError`."""
    if answer[0] != cuda.cudaError_t.cudaSuccess:
        raise CommunicatorError(f"CUDA: {_text(cuda, answer[0])}")
    return answer[1:]


def _text(cuda: ModuleType, error: Any) -> str:
    with suppress(ValueError, TypeError):
        return str(cuda.cudaGetErrorString(error)[1].decode())
    return str(error)
