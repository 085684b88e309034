"""What each worker could do for a request, and at which cost to others: the offers that placement chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from router.placement import prediction
from router.placement.prediction import Forecast
from router.placement.snapshot import Ask, DecodeLoad, Demand, PrefillLoad

LIGHT_TOKENS = 64
"""A prompt with at most this many tokens not cached is light work."""


class Way(Enum):
    """Where a prompt is computed."""

    PREFILL = "prefill"
    DIRECT = "direct"


class Candidate(NamedTuple):
    """One worker that was considered. `load` in tokens (prefill) or as a share of the pool (decode); times in seconds
    where they can be predicted. `miss` is the factor by which the worst objective would be missed, at most 1 where all
    are kept; `breaks` where others would miss theirs. `light` work may be done in place although both pools keep the
    objectives too."""

    name: str
    load: float
    feasible: bool
    note: str = ""
    way: Way | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    miss: float = 0.0
    light: bool = False
    breaks: bool = False
    chosen_at: float = 0.0


class Landing(NamedTuple):
    """A sequence on a decode worker: seconds per token, whether there is `room`, and whether it `breaks` the objective
    of a sequence there."""

    tpot_s: float
    room: bool
    breaks: bool

    def misses(self, tpot_s: float | None) -> bool:
        return not self.room or self.breaks or (tpot_s is not None and self.tpot_s > tpot_s)


def has_room(worker: DecodeLoad, demand: Demand) -> bool:
    """For the likely length of the sequence."""
    return worker.free_blocks >= demand.blocks and worker.sequences < worker.max_sequences


def land(worker: DecodeLoad, ask: Ask) -> Landing:
    return Landing(prediction.step(worker, ask), has_room(worker, ask.demand), prediction.breaks_tpot(worker, ask))


def best_landing(ask: Ask, workers: Sequence[DecodeLoad], landings: Sequence[Landing]) -> Landing | None:
    """On the decode worker that suits best after a handoff. `landings` are as if the sequence were there already."""
    handed = [
        Landing(prediction.handed_over(worker, ask, landing.tpot_s), landing.room, landing.breaks)
        for worker, landing in zip(workers, landings, strict=True)
    ]
    return min(handed, key=lambda landing: (landing.misses(ask.tpot_s), landing.tpot_s), default=None)


def over_both(ask: Ask, worker: PrefillLoad, landing: Landing | None) -> tuple[Candidate, Forecast]:
    """The prompt on a prefill worker, then the handoff to the decode worker of `landing`."""
    forecast = prediction.prefill(worker, ask)
    landing = None if ask.single_token else landing
    return _offer(ask, worker, Way.PREFILL, worker.queued_tokens, forecast, landing, light=False), forecast


def in_place(ask: Ask, worker: DecodeLoad, landing: Landing) -> tuple[Candidate, Forecast]:
    """The prompt and the rest of the sequence on a decode worker."""
    forecast = prediction.direct(worker, ask)
    idle = not worker.sequences and not ask.unbound  # a sequence on its way would wait for the prompt's chunks
    light = idle or ask.tokens - worker.cached_tokens <= LIGHT_TOKENS
    load = worker.tokens / worker.capacity_blocks
    return _offer(ask, worker, Way.DIRECT, load, forecast, landing, light), forecast


def _offer(
    ask: Ask, worker: PrefillLoad | DecodeLoad, way: Way, load: float, forecast: Forecast, landing: Landing | None,
    light: bool,
) -> Candidate:  # fmt: skip
    ttft = forecast.ttft_s / max(ask.ttft_s, 1e-3) if ask.ttft_s is not None else 0.0
    tpot_s = None if landing is None else landing.tpot_s
    tpot = tpot_s / ask.tpot_s if ask.tpot_s is not None and tpot_s is not None else 0.0
    breaks = forecast.breaks or (landing is not None and landing.breaks)
    note = ""
    if ttft > 1:
        note = "ttft"
    elif landing is not None and not landing.room:
        note = "decode_room"
    elif tpot > 1:
        note = "tpot"
    elif breaks:
        note = "others"
    seconds, miss = (forecast.ttft_s, tpot_s), max(ttft, tpot)
    return Candidate(worker.name, load, not note, note, way, *seconds, miss, light, breaks, worker.chosen_at)
