"""A cluster on two cores in simulated time: the real placement, ledgers, queues and schedulers, with a cost model as
engine and with delays as messages and transfers.

On a machine two runs of a minute differ more than two policies do. Here ten thousand requests take seconds, and only
the policy differs between runs. Left out are shortage of blocks, cached prefixes and failures.

    request: arrive -> (queue of a worker) -> start -> first token -> (handed over) -> resident -> end
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from baton.bench.schedule.plan import Planned
from baton.config import PathChoice, RoleName
from baton.cost import HANDOFF_S, CostModel, StepCost, StepShape
from baton.engine import api
from baton.engine.api import Work, shape_of
from baton.engine.simulated import typical_steps
from baton.messages import Command
from baton.model import KvLayout, ModelCard
from baton.spec import AttemptKey, Objectives, ProcessRef, RequestSpec, Sampling
from baton.telemetry import Counts
from baton.worker.prompt_queue import PromptQueue
from benchmarks.simulated.served import Served
from decode_worker.scheduler import DecodeScheduler, Expected
from prefill_worker.scheduler import PrefillScheduler
from router.placement.snapshot import Demand
from router.requests.admitted import Admitted
from router.requests.attempt import Attempt
from router.requests.commands import Commands
from router.requests.placer import Placer
from router.text.detokenisation import OutputText
from router.workers.link import WorkerLink
from router.workers.prefixes import Prefixes, digests_of
from router.workers.served_model import ServedModel
from router.workers.worker import Registration, Worker

CHUNK, BLOCKS, SLOTS, BLOCK_TOKENS = 512, 1 << 20, 256, 16
ONE_BLOCK = 1 << 30
"""Tokens of a block that holds any sequence: memory is not simulated."""
HOP_S = 0.001
"""The delay of a message between router and worker."""
REPORT_S = 0.05
CARD = ModelCard("m", "f" * 32, 8192, 1000, (), "", "", KvLayout(1, 1, 64, "bfloat16"))
ROUTER = ProcessRef("router", "r", "")


@dataclass(frozen=True, slots=True)
class Machine:
    """Two cores. A step takes `cost`, times a lognormal factor of `noise`, times `contention` while the other core
    computes; the first core also spends the router's and the client's time on each frame and token."""

    cost: StepCost
    noise: float = 0.1
    contention: float = 1.1
    frame_s: float = 1.5e-4
    token_s: float = 1.5e-4


class Unsent(Commands):
    """Commands take their time in the simulation; nothing is sent."""

    def send(self, worker: Worker, command: Command) -> None: ...


class ReplicaWorker:
    """A worker: its queue and scheduler, and the router's view of it (`seen`)."""

    def __init__(self, replica: Replica, role: RoleName, index: int, budget_s: float | None) -> None:
        self.replica, self.role, self.core = replica, role, index
        process = ProcessRef(f"{role}-{index}", f"{role}-{index}", "")
        link = WorkerLink(process, ROUTER, on_event=lambda _: None, on_state=lambda: None, on_lost=lambda _: None)
        link.attached = True
        registration = Registration(process, frozenset({role}), CARD, BLOCKS, SLOTS, ())
        self.seen = Worker(registration, link, 0.0, language_ready=True)
        self.model = CostModel(typical_steps(replica.machine.cost))
        self.seen.cost = self.model.cost
        self.scheduler: PrefillScheduler | DecodeScheduler = (
            PrefillScheduler(CHUNK, lambda: self.model.cost)
            if role == "prefill"
            else DecodeScheduler(CHUNK, lambda: self.model.cost, budget_s, lambda: replica.now, ONE_BLOCK)
        )
        self.queue: PromptQueue[Served] = PromptQueue()
        self.started: dict[AttemptKey, Served] = {}
        self.residents: dict[AttemptKey, Served] = {}
        self.expected: dict[AttemptKey, Expected] = {}
        self.busy = False
        self._began: float | None = None
        self._reported_at = -math.inf

    def receive(self, served: Served) -> None:
        spec, now = served.spec, self.replica.now
        served.received_at = now
        if spec.objectives.ttft_ms is not None:
            left = spec.objectives.ttft_ms / 1e3 - (now - served.planned.at_s)
            served.spec = replace(spec, ttft_left_s=left)
        self.queue.push(served, self.model.cost.prefill(spec.known_tokens, 0, CHUNK))
        self._start_waiting()

    def expect(self, served: Served) -> None:
        """A sequence has its grant."""
        tpot_ms = served.spec.objectives.tpot_ms
        if served.key not in self.residents and tpot_ms is not None:
            self._expect({**self.expected, served.key: Expected(served.spec.max_tokens - 1, tpot_ms / 1e3)})

    def take(self, served: Served) -> None:
        """A sequence has arrived."""
        self._expect({key: known for key, known in self.expected.items() if key != served.key})
        sequence = api.Sequence.from_spec(served.spec, [0], served.spec.known_tokens)
        sequence.tokens.append(0)
        sequence.first_token_at = self.replica.now - HANDOFF_S
        served.sequence = sequence
        self.residents[served.key] = served
        self.scheduler.add(sequence)
        self._wake()

    def _expect(self, expected: dict[AttemptKey, Expected]) -> None:
        self.expected = expected
        if isinstance(self.scheduler, DecodeScheduler):
            self.scheduler.expected = tuple(expected.values())

    def _start_waiting(self) -> None:
        while (served := self.queue.first(self.replica.now, self._ahead_s)) is not None:
            if self._ahead(served) >= 2 * CHUNK:
                break
            self.queue.remove(served.key)
            served.sequence = api.Sequence.from_spec(served.spec, [0], 0, served.rank, served.late)
            self.started[served.key] = served
            self.scheduler.add(served.sequence)
            self.replica.after(HOP_S, self.replica.on_started, served)
        self._wake()

    def _ahead(self, served: Served) -> int:
        return sum(other.uncomputed for other in self.started.values() if other.rank <= served.rank)

    def _ahead_s(self, served: Served) -> float:
        under_way = 0.0 if self._began is None else self.replica.now - self._began
        return max(0.0, self.model.cost.prefill(self._ahead(served), 0, CHUNK) - under_way)

    def _wake(self) -> None:
        if not self.busy:
            self.busy = True
            self.replica.after(0.0, self._step)

    def _step(self) -> None:
        batch = self.scheduler.pick()
        self.busy = bool(batch)
        if batch:
            shape = shape_of(batch)
            seconds, self._began = self.replica.seconds(self, shape), self.replica.now
            self.replica.after(seconds, self._stepped, batch, shape, seconds)

    def _stepped(self, batch: Sequence[Work], shape: StepShape, seconds: float) -> None:
        self._began = None
        self.model.observe(shape, seconds)
        drawn = [work.sequence for work in batch if work.samples]
        for work in batch:
            work.sequence.computed += work.count
        for sequence in drawn:
            sequence.tokens.append(0)
            self._drew(self.replica.served[sequence.key], sequence)
        self.replica.streamed(len(drawn))
        self._report()
        self._start_waiting()
        self._step()

    def _drew(self, served: Served, sequence: api.Sequence) -> None:
        over = sequence.rule.reason(0, sequence.output_tokens) is not None
        self.started.pop(served.key, None)
        self.replica.after(HOP_S, self.replica.on_token, served)
        if self.role == "decode":
            self.residents[served.key] = served
        elif not over:
            self.replica.after(HANDOFF_S / 2, self.replica.hand_over, served)
        if over:
            self.scheduler.remove(served.key)
            self.residents.pop(served.key, None)
            self.replica.after(HOP_S, self.replica.on_end, served)

    def _report(self) -> None:
        if self.replica.now - self._reported_at < REPORT_S:
            return
        self._reported_at, seen = self.replica.now, self.seen
        seen.cost = self.model.cost
        seen.prefill.reported(self.queue.tokens + sum(served.uncomputed for served in self.started.values()))
        held = sum(served.demand.blocks for served in self.residents.values())
        tokens = sum(len(served.sequence.tokens) for served in self.residents.values() if served.sequence)
        seen.decode.reported(BLOCKS - held, tokens)


class Replica:
    """The cluster: its clock and events, its router, its workers. `path` is direct for colocated workers."""

    def __init__(self, machine: Machine, path: PathChoice, budget_s: float | None = None, seed: int = 0) -> None:
        roles: tuple[RoleName, ...] = ("decode", "decode") if path == "direct" else ("prefill", "decode")
        self.now, self.machine, self.served = 0.0, machine, dict[AttemptKey, Served]()
        self.workers = [ReplicaWorker(self, role, index, budget_s) for index, role in enumerate(roles)]
        counts = Counts()
        self.placer = Placer(path, Prefixes(0, counts), counts, lambda: self.now)
        self.commands, self.counts = Unsent(counts), counts
        self.model = ServedModel(CARD, workers=[worker.seen for worker in self.workers])
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order, self._chance, self._owed_s = itertools.count(), random.Random(seed), 0.0

    def after(self, seconds: float, call: Callable[..., None], *given: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), call, given))

    def run(self, requests: Sequence[Planned]) -> list[Served]:
        """Runs until all requests have ended."""
        for planned in requests:
            self.after(planned.at_s, self._arrive, planned)
        while self._events:
            self.now, _, call, given = heapq.heappop(self._events)
            call(*given)
        return list(self.served.values())

    def seconds(self, worker: ReplicaWorker, shape: StepShape) -> float:
        """The time of a step that begins now."""
        found = self.machine.cost.seconds(shape) * math.exp(self._chance.gauss(0.0, self.machine.noise))
        if any(other.busy for other in self.workers if other is not worker):
            found *= self.machine.contention
        if worker.core == 0:
            found, self._owed_s = found + self._owed_s, 0.0
        return found

    def streamed(self, tokens: int) -> None:
        """Charges the first core, if it is busy, for a frame of tokens through router and client."""
        if tokens and self.workers[0].busy:
            self._owed_s += self.machine.frame_s + tokens * self.machine.token_s

    def on_started(self, served: Served) -> None:
        """A worker computes the prompt: time to bind a decode worker."""
        attempt = served.attempt
        if served.first_at is None and attempt is not None and attempt.started(attempt.prefill) and attempt.hands_over:
            self._bind(served, attempt)

    def on_token(self, served: Served) -> None:
        """A token has come, perhaps the first one."""
        attempt = served.attempt
        assert attempt is not None, "it was placed"
        served.tokens += 1
        served.last_at = self.now
        if served.first_at is None:
            served.first_at = self.now
            plan = attempt.plan
            if plan.raw_ttft_s is not None:
                attempt.prefill.accuracy.observe(plan.raw_ttft_s, served.ttft_s, plan.ttft_s, self.now)
            attempt.computed(last=served.spec.max_tokens == 1)
        elif not attempt.direct:
            attempt.decodes(served.first_at)

    def hand_over(self, served: Served) -> None:
        """Its blocks have arrived. A prompt that ended before its `Started` arrived is bound here."""
        assert served.attempt is not None, "it was placed"
        if served.attempt.decode is None:
            self._bind(served, served.attempt)
        self._at(served.attempt.decode).take(served)

    def on_end(self, served: Served) -> None:
        assert served.attempt is not None, "it was placed"
        served.attempt.close()

    def _arrive(self, planned: Planned) -> None:
        tokens, output, asked = planned.prompt_tokens, planned.output_tokens, planned.traffic
        spec = RequestSpec(
            request_id=str(planned.index), prompt=(0,) * tokens, sampling=Sampling(), max_tokens=output, router=ROUTER,
            objectives=Objectives(asked.ttft_ms, asked.tpot_ms), priority=asked.priority or 0,
        )  # fmt: skip
        admitted = Admitted(
            spec=spec, model=self.model, text=cast(OutputText, None), digests=digests_of(CARD, (), ""),
            demand=Demand(-(-(tokens + output) // BLOCK_TOKENS), tokens), arrived=planned.at_s, deadline=math.inf,
            likely_tokens=spec.max_tokens,
        )  # fmt: skip
        key = planned.index.to_bytes(16, "little")
        worker, plan = self.placer.place(admitted)
        attempt = Attempt(admitted, worker, plan, self.placer, self.commands, self.counts, key)
        served = self.served[key] = Served(planned, spec.attempted(key), admitted.demand, attempt)
        attempt.start()
        self.after(HOP_S, self._at(worker).receive, served)

    def _bind(self, served: Served, attempt: Attempt) -> None:
        attempt.bind()
        self.after(2 * HOP_S, self._at(attempt.decode).expect, served)

    def _at(self, worker: Worker | None) -> ReplicaWorker:
        return next(each for each in self.workers if each.seen is worker)
