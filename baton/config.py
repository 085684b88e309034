"""Settings of each process, as frozen dataclasses; command-line flags are made from their fields.

A bad value raises ConfigError with the field's name. A setting that several processes have stands in a base class,
without slots, since a class with two bases can't have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal, get_args, get_type_hints

from baton.errors import ConfigError
from baton.objectives import Defaults

LONGEST_S = 604_800.0
"""A week, the longest wait that can be asked for: every clock, timer and field on the wire holds it."""
DEFAULT_MODEL = "smollm2-135m"
DEFAULT_LISTEN = "127.0.0.1:9700"
EngineChoice = Literal["model", "simulated"]
KernelChoice = Literal["auto", "native", "torch"]
WeightChoice = Literal["auto", "bf16", "int8", "int4"]
KvChoice = Literal["auto", "int8"]
TransportChoice = Literal["auto", "shm", "tcp", "nccl", "nixl"]
PathChoice = Literal["adaptive", "disaggregated", "direct"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]
RoleName = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Marks a field as a setting: its heading in `--help`, and the only worker role that uses it, None for both."""

    group: str
    role: RoleName | None = None


GROUPS = "Cluster", "Model", "KV pool", "Scheduling", "Transport", "Simulation", "Process"
CLUSTER, MODEL, POOL, SCHEDULING, TRANSPORT, SIMULATION, PROCESS = map(Setting, GROUPS)


def marks_of(hint: object) -> list[Setting]:
    """The mark in a field's resolved annotation, if it is a setting."""
    return [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Setting)]


def settings_of(config: type, role: RoleName) -> list[str]:
    """Names of the settings in a class that a worker of this role uses."""
    hints = get_type_hints(config, include_extras=True)
    return [name for name, hint in hints.items() if any(mark.role in (None, role) for mark in marks_of(hint))]


def require_choice(field: str, value: object, choices: object) -> None:
    """Raises ConfigError about a field whose value is none of a Literal's."""
    known = get_args(choices)
    require(value in known, field, f"{', '.join(known)}, not {value!r}")


def require(condition: bool, field: str, message: str) -> None:
    """Raises ConfigError about a field unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}: {message}")


def require_at_least(config: object, least: int, *names: str) -> None:
    """Raises ConfigError about the first of these fields with less, or that is not finite."""
    for name in names:
        _require_finite(config, name)
        require(getattr(config, name) >= least, name, f"must be at least {least}, not {getattr(config, name)}")


def require_positive(config: object, *names: str) -> None:
    """Raises ConfigError about the first of these fields that is not above 0, or not finite."""
    for name in names:
        _require_finite(config, name)
        require(getattr(config, name) > 0, name, "must be positive")


def require_durations(config: object, *names: str) -> None:
    """Raises ConfigError about the first of these fields, in seconds, that is not above 0, or is more than a week."""
    require_positive(config, *names)
    for name in names:
        value = getattr(config, name)
        require(value <= LONGEST_S, name, f"must be at most {LONGEST_S:.0f}, a week, not {value:g}")


def _require_finite(config: object, name: str) -> None:
    value = getattr(config, name)
    require(not isinstance(value, float) or isfinite(value), name, f"must be a finite number, not {value}")


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """What a router and a local cluster have in common."""

    path: Annotated[PathChoice, SCHEDULING] = "adaptive"
    """disaggregated: over both pools; direct: prompts are computed on decode workers; adaptive: by each request."""
    slo: Annotated[str, SCHEDULING] = ""
    """Objectives of requests that come without: `[MODEL@]PRIORITY:ttft=MS,tpot=MS`, `*` for any priority, with `;`."""

    def __post_init__(self) -> None:
        require_choice("path", self.path, PathChoice)
        Defaults(self.slo)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What every long-running process has."""

    log_level: Annotated[LogLevel, PROCESS] = "info"
    """The least severe events to log; debug adds tracebacks to errors."""
    log_format: Annotated[LogFormat, PROCESS] = "auto"
    """json, console, or auto: json unless stderr is a terminal."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig(RoutingSettings):
    """A router."""

    max_requests: Annotated[int, SCHEDULING] = 4096
    """Requests in the system at once; one more is refused with RESOURCE_EXHAUSTED."""
    request_limit_s: Annotated[float, SCHEDULING] = 600.0
    """Bounds a request that came without a deadline of its own."""
    prefix_index_blocks: Annotated[int, SCHEDULING] = 1_000_000
    """Cached blocks that it knows of, over all workers, to place prompts by; 0 for none."""
    explained_requests: Annotated[int, SCHEDULING] = 4096
    """The last requests whose placement `baton explain` still tells; 0 for none."""
    listen: Annotated[str, PROCESS] = DEFAULT_LISTEN
    """HOST:PORT to serve on; port 0 takes any free one."""
    name: Annotated[str, PROCESS] = ""
    """Its name in logs and handshakes; made from the host and a random part when empty."""
    lease_s: Annotated[float, PROCESS] = 6.0
    """A worker that has not renewed for this long is taken for lost."""
    client_buffer_tokens: Annotated[int, PROCESS] = 4096
    """Tokens kept for a client that does not read; past it the request is cancelled."""

    def __post_init__(self) -> None:
        RoutingSettings.__post_init__(self)
        require_durations(self, "lease_s", "request_limit_s")
        require_at_least(self, 1, "max_requests", "client_buffer_tokens")
        require_at_least(self, 0, "prefix_index_blocks", "explained_requests")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker and a local cluster, for all of its workers, have in common."""

    model: Annotated[str, MODEL] = DEFAULT_MODEL
    """A built-in name, a Hugging Face folder, a GGUF file, or a hub name."""
    device: Annotated[str, MODEL] = "auto"
    """cpu, cuda or cuda:N; auto is the CPU."""
    dtype: Annotated[str, MODEL] = "auto"
    """float32, bfloat16, float16, or auto: what the device is good at."""
    deterministic: Annotated[bool, MODEL] = False
    """Promise the same bits whatever the batch, the chunking and the worker; native kernels only."""
    weights: Annotated[WeightChoice, MODEL] = "auto"
    """bf16, int8, int4 (native kernels only), or auto: a file's own 4-bit or 8-bit grid, else bf16."""
    kernels: Annotated[KernelChoice, MODEL] = "auto"
    """native: compiled for this processor; torch: slower, equally right; auto: native where it can be had."""
    kv_dtype: Annotated[KvChoice, POOL] = "auto"
    """int8 halves the KV's memory and transfer; auto keeps it in `dtype`."""
    pool_tokens: Annotated[int, POOL] = 32_768
    """Tokens whose KV a worker's block pool holds."""
    chunk_tokens: Annotated[int, SCHEDULING] = 512
    """Prompt tokens computed in one step."""
    max_sequences: Annotated[int, Setting("Scheduling", "decode")] = 64
    """Sequences in one decode step."""
    tpot_budget_ms: Annotated[float, Setting("Scheduling", "decode")] = 0.0
    """Bounds a decode step that also computes prompts in place; 0 goes by the objectives of the sequences in it."""
    transport: Annotated[TransportChoice, TRANSPORT] = "auto"
    """How KV blocks move; auto prefers shared memory where both ends share a machine, and takes nccl between GPUs."""
    engine: Annotated[EngineChoice, SIMULATION] = "model"
    """model computes; simulated takes a cost model's time instead and answers with random tokens."""
    cost_model: Annotated[str, SIMULATION] = "smollm2-135m"
    """What a simulated step costs: smollm2-135m, instant, or a JSON file of coefficients."""
    sim_speed: Annotated[float, SIMULATION] = 1.0
    """Makes the simulated engine so many times as fast as its cost model."""
    sim_kv_bytes_per_token: Annotated[int, SIMULATION] = 0
    """Shrinks the simulated KV of a token to this, a multiple of 4; 0 keeps the model's own layout."""
    sim_eos_after: Annotated[int, SIMULATION] = 0
    """A simulated output ends by itself after this many tokens; 0: never."""
    sim_eos_spread: Annotated[int, SIMULATION] = 0
    """Up to so many tokens earlier or later, by the request's seed."""
    threads: Annotated[int, PROCESS] = 1
    """Threads of a worker's arithmetic. More than the cores at hand is slower, much slower."""

    def __post_init__(self) -> None:
        require_choice("engine", self.engine, EngineChoice)
        require_choice("kernels", self.kernels, KernelChoice)
        require_choice("weights", self.weights, WeightChoice)
        require_choice("kv_dtype", self.kv_dtype, KvChoice)
        require_choice("transport", self.transport, TransportChoice)
        require_at_least(self, 1, "pool_tokens", "max_sequences", "chunk_tokens", "threads")
        for name in ("cost_model", "sim_speed", "sim_kv_bytes_per_token", "sim_eos_after", "sim_eos_spread"):
            only = self.engine == "simulated" or getattr(self, name) == getattr(WorkerSettings, name)
            require(only, name, "for the simulated engine only: give --engine simulated too")
        require_at_least(self, 0, "sim_kv_bytes_per_token", "sim_eos_after", "sim_eos_spread", "tpot_budget_ms")
        bounded = self.sim_eos_spread < max(self.sim_eos_after, 1)
        require(bounded, "sim_eos_spread", f"must be less than sim_eos_after, {self.sim_eos_after}")
        require(self.sim_kv_bytes_per_token % 4 == 0, "sim_kv_bytes_per_token", "must be a multiple of 4")
        require_positive(self, "sim_speed")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(WorkerSettings):
    """A prefill or decode worker."""

    roles: frozenset[RoleName]
    max_ungranted: Annotated[int, Setting("Scheduling", "prefill")] = 4
    """Start no further prompt while this many of its prompts lack a grant."""
    lease_s: Annotated[float, Setting("Transport", "decode")] = 5.0
    """How long a grant lives without a renewal from its writer."""
    handoff_deadline_s: Annotated[float, Setting("Transport", "prefill")] = 30.0
    """Bounds each wait of a handoff: for the grant, for one write, for the answer to the commit."""
    checksums: Annotated[bool, TRANSPORT] = False
    """Check each block's bytes on arrival; the same on all workers."""
    tcp_listen: Annotated[str, Setting("Transport", "decode")] = ""
    """HOST:PORT for KV blocks by tcp; any port of the host of `listen` when empty."""
    tcp_advertise: Annotated[str, Setting("Transport", "decode")] = ""
    """HOST:PORT where others reach that, when it differs: behind a proxy, or with a wildcard."""
    tcp_connections: Annotated[int, Setting("Transport", "prefill")] = 1
    """Connections to each decode worker."""
    tcp_tls_cert: Annotated[str, TRANSPORT] = ""
    """PEM file of this worker's certificate: KV blocks go by TLS; with the two below, and on all workers."""
    tcp_tls_key: Annotated[str, TRANSPORT] = ""
    """PEM file of its key, without a passphrase."""
    tcp_tls_ca: Annotated[str, TRANSPORT] = ""
    """PEM file of the authority that signed every worker's certificate."""
    router: Annotated[str, PROCESS] = DEFAULT_LISTEN
    """HOST:PORT of the router to join."""
    listen: Annotated[str, PROCESS] = "127.0.0.1:0"
    """HOST:PORT to serve on; port 0 takes any free one."""
    advertise: Annotated[str, PROCESS] = ""
    """HOST:PORT where others reach it, when that differs from `listen`."""
    name: Annotated[str, PROCESS] = ""
    """Its name in `baton workers` and timelines; made from the host and a random part when empty."""
    router_hold_s: Annotated[float, PROCESS] = 60.0
    """How long the sequences of a router that is silent on an open connection are kept."""
    pin: Annotated[str, PROCESS] = ""
    """CPUs to stay on, as for taskset: `0` or `0,2-3`."""
    compute_nice: Annotated[int, PROCESS] = 5
    """How far, 0 to 19, the arithmetic's nice value lies above the process's: on a shared core messages go first."""

    def __post_init__(self) -> None:
        WorkerSettings.__post_init__(self)
        require(len(self.roles) == 1, "roles", "one of prefill and decode; both in one process are not built yet")
        given = [bool(value) for value in (self.tcp_tls_cert, self.tcp_tls_key, self.tcp_tls_ca)]
        require(all(given) or not any(given), "tcp_tls_cert", "goes with tcp_tls_key and tcp_tls_ca: all or none")
        require(1 <= self.tcp_connections <= 64, "tcp_connections", f"1 to 64, not {self.tcp_connections}")
        require(0 <= self.compute_nice <= 19, "compute_nice", f"0 to 19, not {self.compute_nice}")
        require_at_least(self, 1, "max_ungranted")
        require_durations(self, "lease_s", "handoff_deadline_s", "router_hold_s")

    @property
    def tcp_tls(self) -> bool:
        """Whether KV blocks that go by tcp are encrypted."""
        return bool(self.tcp_tls_cert)
