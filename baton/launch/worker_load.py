"""What takes long when a worker starts: CPUs, the model card, the pool's memory, the weights."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from baton.config import WorkerConfig
from baton.cost import StepShape
from baton.errors import ConfigError
from kvtransfer.memory import PoolMemory

if TYPE_CHECKING:
    from baton.engine.api import Engine
    from baton.engine.card import ModelCard

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to compute over `memory`. `measured` are steps of its self-measurement, in seconds."""

    card: ModelCard
    engine: Engine
    memory: PoolMemory
    weight_bytes: int
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
    import torch

    from baton.engine.card import describe
    from baton.engine.load import load_engine
    from baton.engine.measure import measure
    from baton.engine.models import resolve

    torch.set_num_threads(config.threads)
    if config.device not in ("auto", "cpu"):
        raise ConfigError(
            f"device {config.device!r}: workers serve from CPU memory only, until there is the nccl transport"
        )
    description = describe(resolve(config.model), config.dtype, "cpu", config.kv_dtype)
    layout = description.card.kv_layout
    memory = PoolMemory(layout, layout.blocks_for(config.pool_tokens))
    engine = load_engine(
        description, device="cpu", buffer=memory.buffer, kernels=config.kernels, weights=config.weights
    )
    engine.warm_up()
    measured = tuple(measure(engine, memory.blocks, description.config.context_tokens))
    log.info(
        "model loaded",
        model=description.card.name,
        kv_dtype=layout.dtype,
        kernels=engine.kernels,
        blocks=memory.blocks,
        pool_bytes=memory.bytes,
        weight_bytes=engine.weight_bytes,
        seconds=round(time.monotonic() - started, 2),
    )
    return Loaded(description.card, engine, memory, engine.weight_bytes, measured)
