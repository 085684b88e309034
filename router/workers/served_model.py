"""A model while some worker serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from baton.config import RoleName
from baton.errors import Mismatch
from baton.identity import fingerprint_difference
from baton.model import ModelCard
from router.text.tokenisation import Language
from router.workers.ranking import Ranking
from router.workers.worker import Worker


@dataclass(eq=False, slots=True)
class ServedModel:
    """A model while it has workers. `language` is there once some worker has delivered it."""

    card: ModelCard
    language: Language | None = None
    workers: list[Worker] = field(default_factory=list)
    """By name."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _usable: dict[RoleName, list[Worker]] = field(default_factory=dict)
    _rankings: dict[RoleName, Ranking] = field(default_factory=dict)

    def usable(self, role: RoleName) -> list[Worker]:
        """Workers of that role that take new work, by name. Not to be changed: the next caller gets it too."""
        found = self._usable.get(role)
        if found is None:
            found = [worker for worker in self.workers if worker.usable and role in worker.registration.roles]
            self._usable[role] = found
        return found

    def changed(self) -> None:
        """What is usable may be different now."""
        self._usable.clear()
        self._rankings.clear()

    def ranking(self, role: RoleName) -> Ranking:
        """The usable ones in the order of what they carry; where there is none, those whose stream is broken but may
        come back."""
        found = self._rankings.get(role)
        if found is None:
            found = self._rankings[role] = Ranking(self.usable(role) or self._away(role), role)
        return found

    def _away(self, role: RoleName) -> list[Worker]:
        return [
            worker
            for worker in self.workers
            if worker.language_ready and not worker.lost and role in worker.registration.roles
        ]


def check_card(ours: ModelCard, theirs: ModelCard) -> None:
    """Raises Mismatch naming the first field in which two workers of one model differ, and both values."""
    found = _differences(asdict(ours), asdict(theirs))
    # The fingerprint covers the rest, so it tells least: another field, if one differs, says what is wrong.
    for name, mine, other in sorted(found, key=lambda difference: difference[0] == "fingerprint"):
        if name == "fingerprint":
            name, mine, other = fingerprint_difference(mine, other)
        raise Mismatch(f"model.{name}", mine, other, _mismatch_text(ours.name, name, mine, other))


def _differences(
    ours: dict[str, object], theirs: dict[str, object], prefix: str = ""
) -> Iterable[tuple[str, str, str]]:
    for name, mine in ours.items():
        other = theirs[name]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            yield f"{prefix}{name}", _show(mine), _show(other)


def _show(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _mismatch_text(model: str, field: str, ours: str, theirs: str) -> str:
    return f"model.{field}: {theirs} differs from {ours}, which the workers here that serve {model} have"
