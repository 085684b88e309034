"""The engine in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.engine.api import Work
from baton.engine.files.card import ModelDescription
from baton.engine.files.tensors import open_tensors
from baton.engine.kv import TORCH_DTYPES, Buffer, KvPool, make_pool
from baton.engine.sampling import Logits
from baton.engine.stepper import Stepper
from baton.engine.torch.model import Model
from baton.engine.torch.plan import make_plan
from baton.engine.torch.weights import load_weights
from baton.errors import ConfigError


class TorchEngine(Stepper):
    """Computes on a CPU or one CUDA device."""

    def __init__(self, description: ModelDescription, model: Model, pool: KvPool) -> None:
        super().__init__(description, pool, f"torch {torch.__version__}", model.weights.bytes)
        self._model = model

    @classmethod
    def load(
        cls, description: ModelDescription, *, device: str = "cpu", buffer: Buffer | None = None,
        blocks: int | None = None,
    ) -> TorchEngine:  # fmt: skip
        """Loads the weights, in the dtype of the card's KV layout.

        The pool is either over `buffer`, writable CPU memory that outlives the engine (as many blocks as fit), or has
        `blocks` blocks of the engine's own. Raises ModelFileError for damaged files, ConfigError for a missing device.
        """
        where = resolve_device(device)
        assert buffer is None or where.type == "cpu", "a pool in the caller's memory is for the CPU"
        layout = description.card.kv_layout
        if layout.dtype not in TORCH_DTYPES:
            raise ConfigError(f"kv_dtype: KV in {layout.dtype} needs the native kernels")
        source = open_tensors(description.model, description.config)
        weights = load_weights(source, description.config, TORCH_DTYPES[layout.dtype], where)
        return cls(description, Model(description.config, weights), make_pool(layout, buffer, blocks, str(where)))

    def wake(self, blocks: Sequence[int]) -> None:
        """Does nothing: beside torch's own time a cold first step does not matter."""

    @torch.inference_mode()
    def _forward(self, batch: list[Work]) -> tuple[tuple[int, ...], Logits]:
        plan = make_plan(batch, self.pool)
        return plan.sampled, self._model.forward(plan, self.pool).cpu().numpy()


def resolve_device(name: str) -> torch.device:
    """Raises ConfigError, in one line, for a device that torch can't compute on here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be cpu or cuda[:N], not {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda[:N], not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this machine has no CUDA device that torch {torch.__version__} can use")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
