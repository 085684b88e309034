"""Settings of each role, as frozen dataclasses; command-line flags are made from them.

A bad value raises ConfigError with the field's name. "auto" is resolved by whoever can, into a new object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from baton.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_LISTEN = "127.0.0.1:9700"
KernelChoice = Literal["auto", "native", "torch"]
WeightChoice = Literal["auto", "bf16", "int8", "int4"]
KvChoice = Literal["auto", "int8"]
TransportChoice = Literal["auto", "shm", "tcp"]
RoleName = Literal["prefill", "decode"]


def require_choice(field: str, value: object, choices: object) -> None:
    """Raises ConfigError about a field whose value is none of a Literal's."""
    known = get_args(choices)
    require(value in known, field, f"{', '.join(known)}, not {value!r}")


def require(condition: bool, field: str, message: str) -> None:
    """Raises ConfigError about a field unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The router."""

    listen: str = DEFAULT_LISTEN
    """HOST:PORT to serve on; port 0 takes any free one."""
    name: str = ""
    """Its name in logs and handshakes; made from host and process id when empty."""
    lease_s: float = 6.0
    """A worker that has not renewed for this long is taken for lost."""
    max_requests: int = 4096
    """Requests in the system at once; one more is refused with RESOURCE_EXHAUSTED."""
    request_limit_s: float = 600.0
    """Bounds a request that came without a deadline of its own."""
    handoff_wait_s: float = 60.0
    """How long a computed prompt waits for a decode worker with room."""
    client_buffer_tokens: int = 4096
    """Tokens kept for a client that does not read; past it the request is cancelled."""
    prefix_index_blocks: int = 1_000_000
    """Cached blocks that it knows of, over all workers, to place prompts by; 0 for none."""

    def __post_init__(self) -> None:
        for field in ("lease_s", "request_limit_s", "handoff_wait_s"):
            require(getattr(self, field) > 0, field, "must be positive")
        for field in ("max_requests", "client_buffer_tokens"):
            require(getattr(self, field) >= 1, field, "must be at least 1")
        require(self.prefix_index_blocks >= 0, "prefix_index_blocks", "must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """A prefill or decode worker."""

    roles: frozenset[RoleName]
    router: str = DEFAULT_LISTEN
    """HOST:PORT of the router to join."""
    listen: str = "127.0.0.1:0"
    """HOST:PORT to serve on; port 0 takes any free one."""
    advertise: str = ""
    """HOST:PORT where others reach it, when that differs from `listen`."""
    name: str = ""
    """Its name in `baton workers` and timelines; made from host and process id when empty."""
    model: str = DEFAULT_MODEL
    """A built-in name, a Hugging Face folder, a GGUF file, or a hub name."""
    device: str = "auto"
    """cpu, or auto, which is the same today: workers can't hand over blocks in a GPU's memory yet."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the device is good at."""
    kernels: KernelChoice = "auto"
    """native: compiled for this processor; torch: slower, equally right; auto: native where it can be had."""
    weights: WeightChoice = "auto"
    """bf16, int8, int4 (native kernels only), or auto: a file's own 4-bit or 8-bit grid, else bf16."""
    kv_dtype: KvChoice = "auto"
    """int8 halves the KV's memory and transfer; auto keeps it in `dtype`."""
    transport: TransportChoice = "auto"
    """How KV blocks move; auto prefers shared memory where both ends share a machine."""
    pool_tokens: int = 32_768
    """Tokens whose KV the block pool holds."""
    max_sequences: int = 64
    """Sequences in one decode step."""
    chunk_tokens: int = 512
    """Prompt tokens computed in one prefill step."""
    tpot_budget_ms: float = 0.0
    """Bounds a decode step that also computes prompts in place; 0 goes by the objectives of the sequences in it."""
    max_ungranted: int = 4
    """A prefill worker starts no further prompt while this many of its prompts lack a grant."""
    threads: int = 1
    """Threads of the arithmetic. More than the cores at hand is slower, much slower."""
    pin: str = ""
    """CPUs to stay on, as for taskset: `0` or `0,2-3`."""
    lease_s: float = 5.0
    """How long a grant lives without a renewal from its writer."""
    handoff_deadline_s: float = 30.0
    """Bounds each wait of a handoff: for the grant, for one write, for the answer to the commit."""
    checksums: bool = False
    """Check each block's bytes on arrival, where the transport moves bytes (tcp)."""

    def __post_init__(self) -> None:
        require(len(self.roles) == 1, "roles", "one of prefill and decode; both in one process are not built yet")
        require(self.transport in ("auto", "shm", "tcp"), "transport", f"auto, shm or tcp, not {self.transport!r}")
        for field, choices in (("kernels", KernelChoice), ("weights", WeightChoice), ("kv_dtype", KvChoice)):
            require_choice(field, getattr(self, field), choices)
        for field in ("pool_tokens", "max_sequences", "chunk_tokens", "max_ungranted", "threads"):
            require(getattr(self, field) >= 1, field, f"must be at least 1, not {getattr(self, field)}")
        for field in ("lease_s", "handoff_deadline_s"):
            require(getattr(self, field) > 0, field, "must be positive")
        require(self.tpot_budget_ms >= 0, "tpot_budget_ms", f"must not be negative, not {self.tpot_budget_ms}")
