"""The registered workers, and the models they serve.

    register -> JOINING --stream up and artifacts here--> USABLE --lease over, stream lost, replaced, left--> gone

A worker renews its lease; one timer waits for the earliest lease to end. The first worker of a model defines it, and
others with the same model name must agree in everything. A model is forgotten with its last worker.
"""

from __future__ import annotations

import asyncio
import bisect
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import structlog

from baton.errors import BatonError, InvalidArgument, NotFound, Unavailable
from baton.messages import Event
from baton.model import ModelCard
from baton.rpc import awake, net
from baton.spec import ProcessRef
from baton.telemetry import Counts
from router.text.tokenisation import Language, LanguageParts
from router.workers.artifacts import ArtifactStore
from router.workers.link import WorkerLink, disproves
from router.workers.served_model import ServedModel, check_card
from router.workers.worker import Registration, Worker

NO_WORKER_RETRY_S = 1.0
PROBE_S = 0.25
LOSSES = 1024
"""Losses that are remembered, to tell a worker that still renews."""
SHOWN_CHARACTERS = 128
"""Of a model's name that a client made up."""
LEFT = "it left"
"""The reason of a loss that is logged without a warning."""
log = structlog.get_logger(__name__)


class Loss(NamedTuple):
    """Why an incarnation was lost; `disproved`: another process answers at its address."""

    reason: str
    disproved: bool


class Registry:
    """Owns the workers, their links and their leases. Lives on one event loop.

    `on_joined(worker)` is called before a worker's stream starts, `on_event(worker, event)` for each of its events,
    `on_stalled(worker, reason)` when it does not move, `on_lost(worker, reason)` once when it is gone, `on_change()`
    whenever the set of usable workers may have changed.
    """

    def __init__(
        self,
        router: ProcessRef,
        lease_s: float,
        executor: Executor,
        counts: Counts,
        *,
        on_joined: Callable[[Worker], None],
        on_event: Callable[[Worker, Event | None], None],
        on_lost: Callable[[Worker, str], None],
        on_stalled: Callable[[Worker, str], None],
        on_change: Callable[[], None],
    ) -> None:
        self.lease_s = lease_s
        self.models: dict[str, ServedModel] = {}
        self._router, self._executor, self._counts = router, executor, counts
        self._on_joined, self._on_event = on_joined, on_event
        self._on_lost, self._on_stalled, self._on_change = on_lost, on_stalled, on_change
        self._workers: dict[str, Worker] = {}
        self._artifacts = ArtifactStore()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: awake.Timer | None = None
        self._losses: OrderedDict[str, Loss] = OrderedDict()
        self._closed = False

    def workers(self) -> list[Worker]:
        """All that hold a lease, in order of their names."""
        return sorted(self._workers.values(), key=lambda worker: worker.name)

    def by_name(self, name: str) -> Worker:
        """The name must be in use."""
        return self._workers[name]

    def find_model(self, name: str) -> ServedModel:
        """The only model where the name is empty. Raises InvalidArgument, or Unavailable while there is no model."""
        if not self.models:
            raise Unavailable("no worker has joined this router", NO_WORKER_RETRY_S, "workers")
        if not name and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(sorted(self.models))
            why = f"{name[:SHOWN_CHARACTERS]!r} is not served here; models: {known}" if name else f"one of {known}"
            raise InvalidArgument("model", why)
        return self.models[name]

    async def register(self, given: Registration) -> Worker:
        """A worker joins, or repeats its registration, which renews its lease.

        A new incarnation of a name replaces one that is gone. Raises InvalidArgument while the old one lives: two that
        both renew would evict each other for ever; and where its address was found to be another's. Mismatch when its
        model differs from that of the same name; Unavailable when the router is closing.
        """
        self._check_address(given.process)
        known = self._workers.get(given.process.name)
        if known is not None and await _lives_beside(known, given):
            why = f"{known.name!r} is the name of a live worker at {known.process.address}; this one needs another"
            raise InvalidArgument("worker.name", why)
        if self._closed:
            raise Unavailable("the router is shutting down", NO_WORKER_RETRY_S)
        known = self._workers.get(given.process.name)
        if known is not None and known.registration == given:
            known.lease_until = awake.now() + self.lease_s
            return known
        others = {model.card.name: model for model in self.models.values() if model.workers != [known]}
        if given.card.name in others:
            check_card(others[given.card.name].card, given.card)
        if known is not None:
            self.lose(known, "it registered anew")
        return self._join(given)

    def renew(self, process: ProcessRef) -> None:
        """Extends the lease. Raises NotFound without one, InvalidArgument where its address is another's."""
        self._check_address(process)
        worker = self._holder(process)
        if worker is None:
            lost = self._losses.get(process.incarnation)
            why = f"is not registered here any more: {lost.reason}" if lost else "is not registered here"
            raise NotFound(f"{process.name} {why}")
        worker.lease_until = awake.now() + self.lease_s

    def deregister(self, process: ProcessRef) -> None:
        """Idempotent."""
        worker = self._holder(process)
        if worker is not None:
            self.lose(worker, LEFT)

    def lose(self, worker: Worker, reason: str, disproved: bool = False) -> None:
        """Removes the worker, its lease and its stream, and a model with its last worker. Idempotent. `disproved`: its
        address is another's, so this incarnation can't come back."""
        if worker.lost:
            return
        worker.lost = True
        self._losses[worker.process.incarnation] = Loss(reason, disproved)
        if len(self._losses) > LOSSES:
            self._losses.popitem(last=False)
        del self._workers[worker.name]
        model = self.models[worker.card.name]
        if worker in model.workers:
            model.workers.remove(worker)
        if not model.workers:
            del self.models[worker.card.name]
        (log.info if self._closed or reason == LEFT else log.warning)("worker lost", worker=worker.name, reason=reason)
        self._counts.add("workers_lost")
        worker.link.abandon()
        self._spawn(worker.link.wait_closed(), f"farewell to {worker.name}")
        model.changed()  # before a request looks for another worker
        self._on_lost(worker, reason)
        self._on_change()

    async def close(self) -> None:
        """Ends all streams in order and forgets all workers."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(worker.link.close() for worker in self.workers()))
        for worker in self.workers():
            self.lose(worker, "the router is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _join(self, given: Registration) -> Worker:
        link = WorkerLink(
            given.process,
            self._router,
            on_event=lambda event: self._on_event(worker, event),
            on_state=lambda: self._changed(model),
            on_lost=lambda reason: self.lose(worker, reason, link.disproved),
            busy=lambda: worker.busy,
            on_stalled=lambda reason: self._on_stalled(worker, reason),
        )
        worker = Worker(given, link, awake.now() + self.lease_s)
        self._workers[worker.name] = worker
        model = self.models.setdefault(given.card.name, ServedModel(given.card))
        bisect.insort(model.workers, worker, key=lambda other: other.name)
        log.info("worker joined", worker=worker.name, roles=sorted(given.roles), model=given.card.name)
        self._counts.add("workers_joined")
        self._spawn(self._prepare(worker, model), f"artifacts of {worker.name}")
        self._arm()
        return worker

    async def _prepare(self, worker: Worker, model: ServedModel) -> None:
        try:
            async with model.loading:
                if model.language is None:
                    model.language = await self._load(model.card, worker.process)
        except BatonError as error:
            # It registers again, and may do better.
            self.lose(worker, f"its artifacts can't be used: {error}", disproves(error))
            return
        if worker.lost:
            return
        worker.language_ready = True
        self._on_joined(worker)
        worker.link.start()  # only now: a worker that finds itself attached can be used
        self._changed(model)

    async def _load(self, card: ModelCard, worker: ProcessRef) -> Language:
        tokenizer = await self._artifacts.get(card.tokenizer_sha256, worker)
        template = await self._artifacts.get(card.chat_template_sha256, worker) if card.chat_template_sha256 else None

        parts = LanguageParts(
            card.name,
            tokenizer,
            None if template is None else template.decode(errors="replace"),
            bos_token_id=card.bos_token_id,
            bos_token=card.bos_token,
            eos_token=card.eos_token,
        )
        return await asyncio.get_running_loop().run_in_executor(self._executor, Language, parts)

    def _changed(self, model: ServedModel) -> None:
        model.changed()
        self._on_change()

    def _check_address(self, process: ProcessRef) -> None:
        lost = self._losses.get(process.incarnation)
        if lost is not None and lost.disproved:
            raise InvalidArgument("worker.address", f"{process.address} is not {process.name}'s own: {lost.reason}")

    def _holder(self, process: ProcessRef) -> Worker | None:
        worker = self._workers.get(process.name)
        return worker if worker is not None and worker.process.incarnation == process.incarnation else None

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("unexpected error", task=task.get_name(), exc_info=error)

    def _arm(self) -> None:
        """One timer for the earliest lease; after a renewal it fires early and is set anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._workers and not self._closed:
            earliest = min(worker.lease_until for worker in self._workers.values())
            self._timer = awake.Timer(max(0.0, earliest - awake.now()), self._expire)

    def _expire(self) -> None:
        now = awake.now()
        for worker in self.workers():
            if worker.lease_until <= now:
                self.lose(worker, f"it has not renewed its lease for {self.lease_s:g} s")
        self._arm()


async def _lives_beside(known: Worker, given: Registration) -> bool:
    """Whether `known` is another process, and alive. The stream of a process that has just died may still seem to be
    up, so its address is probed; a new process at the same address is its successor."""
    old, new = known.process, given.process
    if not known.link.attached or old.incarnation == new.incarnation or old.address == new.address:
        return False
    return await net.listens(old.address, PROBE_S) and known.link.attached
