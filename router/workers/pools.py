"""Which pools of workers a model has, and what can be served while one of them is empty.

| path          | without prefill workers               | without decode workers                              |
|---------------|---------------------------------------|-----------------------------------------------------|
| adaptive      | prompts are computed in place         | a single token, which a prefill worker serves alone |
| disaggregated | nothing                               | a single token, likewise                            |
| direct        | everything: no request uses that pool | nothing                                             |

A worker whose stream broke is there until it is lost: what is sent to it waits for the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from baton.config import PathChoice, RoleName
from baton.errors import Unavailable
from router.workers.registry import NO_WORKER_RETRY_S
from router.workers.served_model import ServedModel
from router.workers.worker import Worker

TOLD_AFTER_S = 1.0
log = structlog.get_logger(__name__)


def roles_of(path: PathChoice) -> tuple[RoleName, ...]:
    """The pools that requests use."""
    return ("decode",) if path == "direct" else ("prefill", "decode")


def workers_for(path: PathChoice, model: ServedModel, *, single_token: bool) -> dict[RoleName, list[Worker]]:
    """By role, the workers that a request may use. A pool that it can do without may be empty; raises Unavailable for
    one that it needs."""
    there = {role: model.there(role) for role in roles_of(path)}
    if path == "disaggregated" and not there["prefill"]:
        why = ", and the path setting (disaggregated) forbids computing prompts in place"
        raise _unavailable("prefill", model, why)
    if not there["decode"] and not (single_token and there.get("prefill")):
        raise _unavailable("decode", model)
    return there


def serves(path: PathChoice, model: ServedModel) -> bool:
    """Whether some request for more than one token can be served."""
    return bool(model.there("decode") and (path != "disaggregated" or model.there("prefill")))


def missing(path: PathChoice, model: ServedModel) -> dict[RoleName, str]:
    """The pools that the model lacks, and in words what follows from that."""
    empty = [role for role in roles_of(path) if not model.there(role)]
    return {role: f"{model.card.name}: no {role} worker; {_consequence(path, empty)}" for role in empty}


def _consequence(path: PathChoice, empty: list[RoleName]) -> str:
    if len(empty) == len(roles_of(path)):
        return "all requests are refused"
    if empty == ["decode"]:
        return "only requests for a single token are served"
    if path == "adaptive":
        return "prompts are computed in place, on decode workers"
    return "all requests are refused: the path setting (disaggregated) forbids computing prompts in place"


def _unavailable(role: RoleName, model: ServedModel, why: str = "") -> Unavailable:
    return Unavailable(f"no {role} worker of {model.card.name} is there{why}", NO_WORKER_RETRY_S, f"{role}_workers")


class PoolWatch:
    """Logs once that a model lacks a pool, and once that it has it again. That is a warning where the pool was there
    before; at a start it is told only of a model that is served already. What lasts less than TOLD_AFTER_S is not
    told, such as that one pool leaves before the other when all are stopped."""

    def __init__(self, path: PathChoice, models: Mapping[str, ServedModel]) -> None:
        self._path, self._models = path, models
        self._timer: asyncio.TimerHandle | None = None
        self._met: set[tuple[str, RoleName]] = set()
        self._told: set[tuple[str, RoleName]] = set()

    def changed(self) -> None:
        """The workers that are there may have changed. Looks soon, once."""
        for model in self._models.values():
            self._met |= {(model.card.name, role) for role in roles_of(self._path) if model.there(role)}
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TOLD_AFTER_S, self.look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        self._timer = None
        self._met = {pool for pool in self._met if pool[0] in self._models}
        before, self._told = self._told, set()
        for name, model in self._models.items():
            lines = missing(self._path, model)
            for role in roles_of(self._path):
                pool = name, role
                if role not in lines:
                    if pool in before:
                        log.info("no longer degraded", model=name, pool=role)
                elif pool in self._met or serves(self._path, model):
                    self._told.add(pool)
                    if pool not in before:
                        (log.warning if pool in self._met else log.info)("degraded", missing=lines[role])
