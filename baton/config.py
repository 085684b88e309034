"""Settings of each role, as frozen dataclasses; command-line flags are made from them.

A bad value raises ConfigError with the field's name. "auto" is resolved by whoever can, into a new object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from baton.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_LISTEN = "127.0.0.1:9700"
EngineChoice = Literal["model", "simulated"]
KernelChoice = Literal["auto", "native", "torch"]
WeightChoice = Literal["auto", "bf16", "int8", "int4"]
KvChoice = Literal["auto", "int8"]
TransportChoice = Literal["auto", "shm", "tcp", "nccl", "nixl"]
PathChoice = Literal["adaptive", "disaggregated", "direct"]
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
    path: PathChoice = "adaptive"
    """disaggregated: over both pools; direct: prompts are computed on decode workers; adaptive: by each request."""
    slo: str = ""
    """Objectives of requests that come without: `[MODEL@]PRIORITY:ttft=MS,tpot=MS`, `*` for any priority, with `;`."""
    client_buffer_tokens: int = 4096
    """Tokens kept for a client that does not read; past it the request is cancelled."""
    prefix_index_blocks: int = 1_000_000
    """Cached blocks that it knows of, over all workers, to place prompts by; 0 for none."""

    def __post_init__(self) -> None:
        for field in ("lease_s", "request_limit_s", "handoff_wait_s"):
            require(getattr(self, field) > 0, field, "must be positive")
        paths = get_args(PathChoice)
        require(self.path in paths, "path", f"{', '.join(paths)}, not {self.path!r}")
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
    engine: EngineChoice = "model"
    """model computes; simulated takes a cost model's time instead and answers with random tokens."""
    cost_model: str = "smollm2-135m"
    """What a simulated step costs: smollm2-135m, instant, or a JSON file of coefficients."""
    sim_speed: float = 1.0
    """Makes the simulated engine so many times as fast as its cost model."""
    sim_kv_bytes_per_token: int = 0
    """Shrinks the simulated KV of a token to this, a multiple of 4; 0 keeps the model's own layout."""
    sim_eos_after: int = 0
    """A simulated output ends by itself after this many tokens; 0: never."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is the CPU."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the device is good at."""
    kernels: KernelChoice = "auto"
    """native: compiled for this processor; torch: slower, equally right; auto: native where it can be had."""
    weights: WeightChoice = "auto"
    """bf16, int8, int4 (native kernels only), or auto: a file's own 4-bit or 8-bit grid, else bf16."""
    kv_dtype: KvChoice = "auto"
    """int8 halves the KV's memory and transfer; auto keeps it in `dtype`."""
    deterministic: bool = False
    """Promise the same bits whatever the batch, the chunking and the worker; native kernels only."""
    transport: TransportChoice = "auto"
    """How KV blocks move; auto prefers shared memory where both ends share a machine, and takes nccl between GPUs."""
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
    compute_nice: int = 5
    """How far, 0 to 19, the arithmetic's nice value lies above the process's: on a shared core messages go first."""
    lease_s: float = 5.0
    """How long a grant lives without a renewal from its writer."""
    handoff_deadline_s: float = 30.0
    """Bounds each wait of a handoff: for the grant, for one write, for the answer to the commit."""
    checksums: bool = False
    """Check each block's bytes on arrival; the same on all workers."""
    tcp_listen: str = ""
    """HOST:PORT for KV blocks by tcp; any port of the host of `listen` when empty."""
    tcp_advertise: str = ""
    """HOST:PORT where others reach that, when it differs: behind a proxy, or with a wildcard."""
    tcp_connections: int = 1
    """Connections that a prefill worker opens to each decode worker."""
    tcp_tls_cert: str = ""
    """PEM file of this worker's certificate: KV blocks go by TLS; with the two below, and on all workers."""
    tcp_tls_key: str = ""
    """PEM file of its key, without a passphrase."""
    tcp_tls_ca: str = ""
    """PEM file of the authority that signed every worker's certificate."""

    def __post_init__(self) -> None:
        require(len(self.roles) == 1, "roles", "one of prefill and decode; both in one process are not built yet")
        for field, choices in (
            ("engine", EngineChoice),
            ("kernels", KernelChoice),
            ("weights", WeightChoice),
            ("kv_dtype", KvChoice),
            ("transport", TransportChoice),
        ):
            require_choice(field, getattr(self, field), choices)
        given = [bool(value) for value in (self.tcp_tls_cert, self.tcp_tls_key, self.tcp_tls_ca)]
        require(all(given) or not any(given), "tcp_tls_cert", "goes with tcp_tls_key and tcp_tls_ca: all or none")
        require(1 <= self.tcp_connections <= 64, "tcp_connections", f"1 to 64, not {self.tcp_connections}")
        for field in ("pool_tokens", "max_sequences", "chunk_tokens", "max_ungranted", "threads"):
            require(getattr(self, field) >= 1, field, f"must be at least 1, not {getattr(self, field)}")
        require(0 <= self.compute_nice <= 19, "compute_nice", f"0 to 19, not {self.compute_nice}")
        simulated = {"cost_model": "smollm2-135m", "sim_speed": 1.0, "sim_kv_bytes_per_token": 0, "sim_eos_after": 0}
        for field, default in simulated.items():
            only = self.engine == "simulated" or getattr(self, field) == default
            require(only, field, "for the simulated engine only: give --engine simulated too")
        for field in ("sim_kv_bytes_per_token", "sim_eos_after"):
            require(getattr(self, field) >= 0, field, f"must be 0 or more, not {getattr(self, field)}")
        require(self.sim_kv_bytes_per_token % 4 == 0, "sim_kv_bytes_per_token", "must be a multiple of 4")
        for field in ("lease_s", "handoff_deadline_s", "sim_speed"):
            require(getattr(self, field) > 0, field, "must be positive")
        require(self.tpot_budget_ms >= 0, "tpot_budget_ms", f"must not be negative, not {self.tpot_budget_ms}")

    @property
    def tcp_tls(self) -> bool:
        """Whether KV blocks that go by tcp are encrypted."""
        return bool(self.tcp_tls_cert)
