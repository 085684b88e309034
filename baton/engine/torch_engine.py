"""The engine: one mixed step after the other, over one model and one block pool."""

from __future__ import annotations

import torch

from baton.engine.api import Sampled, Sequence, Work
from baton.engine.card import ModelDescription
from baton.engine.kv import TORCH_DTYPES, Buffer, KvPool
from baton.engine.model import Model
from baton.engine.plan import Plan, make_plan
from baton.engine.sampler import Logits, logprobs, sample
from baton.engine.state import state_of
from baton.engine.tensors import open_tensors
from baton.engine.weights import load_weights
from baton.errors import ConfigError
from baton.spec import Sampling, TokenLogprobs
from kvtransfer.layout import KvLayout


class TorchEngine:
    """`baton.engine.api.Engine` in plain torch, on a CPU or one CUDA device. Used from one thread."""

    def __init__(self, description: ModelDescription, model: Model, pool: KvPool) -> None:
        self.description = description
        self._model = model
        self._pool = pool

    @classmethod
    def load(
        cls,
        description: ModelDescription,
        *,
        device: str = "cpu",
        buffer: Buffer | None = None,
        blocks: int | None = None,
    ) -> TorchEngine:
        """Loads the weights, in the dtype of the card's KV layout.

        The pool is either in `buffer`, writable CPU memory that outlives the engine (as many blocks as fit), or
        `blocks` blocks of the engine's own. Raises ModelFileError for damaged files, ConfigError for a device that is
        not there.
        """
        assert (buffer is None) != (blocks is None), "give either the pool's memory or its size"
        where = resolve_device(device)
        assert buffer is None or where.type == "cpu", "a pool in the caller's memory is for the CPU"
        layout = description.card.kv_layout
        source = open_tensors(description.model, description.config)
        weights = load_weights(source, description.config, TORCH_DTYPES[layout.dtype], where)
        pool = KvPool.over(buffer, layout) if buffer is not None else KvPool.allocate(blocks or 0, layout, where)
        return cls(description, Model(description.config, weights), pool)

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def pool(self) -> KvPool:
        """The blocks it computes on."""
        return self._pool

    @torch.inference_mode()
    def step(self, batch: list[Work]) -> list[Sampled | None]:
        """See `api.Engine.step`. Every token id must be below the vocabulary's size."""
        plan, logits = self._forward(batch)
        results: list[Sampled | None] = [None] * len(batch)
        for row, index in enumerate(plan.sampled):
            results[index] = _sampled(batch[index].sequence, logits[row])
        return results

    @torch.inference_mode()
    def logits(self, batch: list[Work]) -> dict[int, Logits]:
        """A step that draws nothing: per index of a work item that would sample, its logits [vocabulary]."""
        plan, logits = self._forward(batch)
        return {index: logits[row] for row, index in enumerate(plan.sampled)}

    def warm_up(self) -> None:
        """Runs one prefill and one decode step on block 0, before any sequence holds it."""
        tokens = min(self.layout.block_tokens, self.description.config.context_tokens)
        sequence = Sequence(bytes(16), [0] * (tokens - 1), tokens - 1, [0], 0, Sampling(temperature=0.0))
        self.step([Work(sequence, tokens - 1)])
        sequence.tokens.append(0)
        self.step([Work(sequence, 1)])

    def _forward(self, batch: list[Work]) -> tuple[Plan, Logits]:
        assert batch, "a step computes something"
        for work in batch:
            _check(work, self.layout)
        plan = make_plan(batch, self._pool)
        logits: Logits = self._model.forward(plan, self._pool).cpu().numpy()
        for work in batch:
            work.sequence.computed += work.count
        return plan, logits


def resolve_device(name: str) -> torch.device:
    """ConfigError, in one line, for a device that torch can't compute on here."""
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


def _check(work: Work, layout: KvLayout) -> None:
    sequence = work.sequence
    assert 1 <= work.count <= sequence.remaining, "a step computes known tokens"
    covered = len(sequence.blocks) * layout.block_tokens
    assert sequence.computed + work.count <= covered, "blocks cover what is computed"


def _sampled(sequence: Sequence, logits: Logits) -> Sampled:
    sampling, penalties = sequence.sampling, state_of(sequence).penalties
    if penalties is not None:
        penalties.observe(sequence.tokens, len(logits))
    token = sample(logits, sampling, len(sequence.tokens), penalties)
    reported: tuple[TokenLogprobs, ...] = ()
    if sampling.logprobs is not None:
        reported = (logprobs(logits, token, sampling.logprobs),)
    return Sampled((token,), reported)
