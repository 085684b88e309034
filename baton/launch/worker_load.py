"""The slow part of a worker's start: CPUs, the model card, the pool's memory, the weights."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from baton.config import KernelChoice, WorkerConfig
from baton.cost import StepShape
from baton.errors import ConfigError
from kvtransfer.blocks.memory import BlockCopy, PoolMemory, copy_runs
from kvtransfer.transports.nccl.library import DevicePool

if TYPE_CHECKING:
    from baton.engine.api import Engine
    from baton.engine.files.card import LocalCard

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to compute over `memory`. `kernels` is for logs; `measured` are the steps of its
    self-measurement, with their seconds."""

    card: LocalCard
    engine: Engine
    memory: PoolMemory | DevicePool
    weight_bytes: int
    kernels: str
    measured: tuple[tuple[StepShape, float], ...] = ()


def claim_cpus(config: WorkerConfig) -> None:
    """Before torch is loaded: its threads inherit the CPUs, and OpenMP reads its setting once."""
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    if config.pin:
        try:
            os.sched_setaffinity(0, parse_cpus(config.pin))
        except OSError as error:
            raise ConfigError(f"pin: CPUs {config.pin!r}: {(error.strerror or str(error)).lower()}") from None


def parse_cpus(text: str) -> set[int]:
    """`0,2-3` as {0, 2, 3}. Raises ConfigError."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"pin: expected CPUs such as 0 or 0,2-3, not {text!r}")
        cpus |= set(range(int(first), int(last if dash else first) + 1))
    return cpus


def load(config: WorkerConfig) -> Loaded:
    """Blocks for seconds. Raises ConfigError, or ModelFileError, in one line each."""
    started = time.monotonic()
    loaded = _simulated(config) if config.engine == "simulated" else _computing(config)
    log.info(
        "model loaded",
        model=loaded.card.name,
        kv_dtype=loaded.card.kv_layout.dtype,
        kernels=loaded.kernels,
        blocks=loaded.memory.blocks,
        pool_bytes=loaded.memory.bytes,
        weight_bytes=loaded.weight_bytes,
        seconds=round(time.monotonic() - started, 2),
    )
    return loaded


def _simulated(config: WorkerConfig) -> Loaded:
    from baton.engine.simulated import simulated_card, simulated_engine, typical_steps

    card = simulated_card(config)
    memory = PoolMemory(card.kv_layout, card.kv_layout.blocks_for(config.pool_tokens))
    engine = simulated_engine(config, card, memory.buffer)
    return Loaded(card, engine, memory, 0, "none: simulated", typical_steps(engine.costs))


def _computing(config: WorkerConfig) -> Loaded:
    import torch

    from baton.engine.files.card import computed_by, describe
    from baton.engine.files.models import resolve
    from baton.engine.load import load_engine
    from baton.engine.measure import measure
    from baton.engine.native.engine import NativeEngine
    from baton.engine.torch.engine import resolve_device

    torch.set_num_threads(config.threads)
    device = "cpu" if config.device == "auto" else str(resolve_device(config.device))
    description = describe(resolve(config.model), config.dtype, device, config.kv_dtype)
    layout = description.card.kv_layout
    blocks = layout.blocks_for(config.pool_tokens)
    host = PoolMemory(layout, blocks) if device == "cpu" else None
    engine = load_engine(
        description,
        device=device,
        buffer=None if host is None else host.buffer,
        blocks=blocks if host is None else None,
        kernels=config.kernels,
        weights=config.weights,
        deterministic=config.deterministic,
    )
    memory = DevicePool(layout, blocks, engine.pool.blocks.data_ptr()) if host is None else host
    engine.warm_up()
    measured = tuple(measure(engine, memory.blocks, description.config.context_tokens))
    card = description.card
    if config.deterministic:
        assert isinstance(engine, NativeEngine), "no other engine is loaded for it"
        card = computed_by(card, {"weights": config.weights} | engine.arithmetic)
    return Loaded(card, engine, memory, engine.weight_bytes, engine.kernels, measured)


def block_copy(kernels: KernelChoice) -> BlockCopy:
    """The kernels' copy where they are in use, else the plain one."""
    from baton.engine.native.build import NativeUnavailable
    from baton.engine.native.library import load as load_library

    if kernels == "torch":
        return copy_runs
    try:
        return load_library().copy_blocks
    except NativeUnavailable:
        return copy_runs
