"""A pool in a GPU's memory, filled and read from the host. Needs the extra [cuda] and a device."""

from __future__ import annotations

import ctypes
from typing import Any

from kvtransfer.blocks.memory import PoolMemory


class CudaMemory:
    """A copy of `host` on device 0; implements `BlockMemory`. Freed with its process."""

    def __init__(self, host: PoolMemory) -> None:
        from cuda.bindings import runtime

        self._cuda: Any = runtime
        self.layout = host.layout
        self.blocks = host.blocks
        error, address = runtime.cudaMalloc(host.bytes)
        assert error == runtime.cudaError_t.cudaSuccess, error
        self.address = int(address)
        self._copy(self.address, host.address, host.bytes)

    def read(self, block: int) -> bytes:
        size = self.layout.block_bytes
        data = bytearray(size)
        target = ctypes.addressof(ctypes.c_char.from_buffer(data))
        self._copy(target, self.address + block * size, size)
        return bytes(data)

    def clear(self) -> None:
        (error,) = self._cuda.cudaMemset(self.address, 0, self.blocks * self.layout.block_bytes)
        assert error == self._cuda.cudaError_t.cudaSuccess, error
        (error,) = self._cuda.cudaDeviceSynchronize()
        assert error == self._cuda.cudaError_t.cudaSuccess, error

    def _copy(self, target: int, source: int, size: int) -> None:
        (error,) = self._cuda.cudaMemcpy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDefault)
        assert error == self._cuda.cudaError_t.cudaSuccess, error
