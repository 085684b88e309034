"""Workers, models and requests for the placer, without streams."""

from __future__ import annotations

import asyncio
import os
from typing import cast

from baton.config import PathChoice, RoleName
from baton.cost import StepCost
from baton.model import KvLayout, ModelCard
from baton.spec import Objectives, ProcessRef, RequestSpec, Sampling
from baton.telemetry import Counts
from kvtransfer.blocks.prefix import Digests
from router.placement.snapshot import Demand, Queued
from router.requests.admitted import Admitted
from router.requests.placer import Placer
from router.text.detokenisation import OutputText
from router.workers.link import WorkerLink
from router.workers.prefixes import Prefixes, digests_of
from router.workers.served_model import ServedModel
from router.workers.worker import Registration, Worker

ROUTER = ProcessRef("router", "r-1", "")
CARD = ModelCard("m", "f" * 32, 4096, 1000, (), "", "", KvLayout(2, 1, 4, "float32"))
COST = StepCost(chunk=0.001, per_token=0.001, step=0.005, per_sequence=0.001)


def worker(role: RoleName, index: int, blocks: int = 64) -> Worker:
    process = ProcessRef(f"{role}-{index:02}", os.urandom(4).hex(), "")
    link = WorkerLink(process, ROUTER, on_event=lambda _: None, on_state=lambda: None, on_lost=lambda _: None)
    link.attached = True
    made = Worker(Registration(process, frozenset({role}), CARD, blocks, 8, ()), link, 0.0, language_ready=True)
    made.cost = COST
    return made


def model(*workers: Worker) -> ServedModel:
    return ServedModel(CARD, workers=list(workers))


def busy(at: Worker, seconds: float, rank: float) -> None:
    at.prefill.place(os.urandom(16), round(seconds * 1000), Queued(rank, seconds))


class Cached(Prefixes):
    """What each worker holds, as the test says."""

    def __init__(self, tokens: dict[Worker, int]) -> None:
        super().__init__(0, Counts())
        self.tokens = tokens

    def cached_tokens(self, card: ModelCard, known: int, digests: Digests) -> dict[Worker, int]:
        return self.tokens


def placer(path: PathChoice, counts: Counts | None = None, cached: dict[Worker, int] | None = None) -> Placer:
    return Placer(path, Cached(cached or {}), counts or Counts())


def request(
    ttft_ms: float | None,
    of: ServedModel,
    refuses: bool = True,
    tokens: int = 100,
    tpot_ms: float | None = None,
    max_tokens: int = 8,
) -> Admitted:
    prompt = tuple(range(tokens))
    spec = RequestSpec(
        request_id="r", prompt=prompt, sampling=Sampling(), max_tokens=max_tokens, router=ROUTER,
        objectives=Objectives(ttft_ms, tpot_ms),
    )  # fmt: skip
    now = asyncio.get_running_loop().time()
    return Admitted(
        spec=spec, model=of, text=cast(OutputText, None), demand=Demand(8, tokens), digests=digests_of(CARD, prompt,
        ""), arrived=now, deadline=now + 60, likely_tokens=max_tokens, refuses=refuses,
    )  # fmt: skip
