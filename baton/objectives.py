"""Operators' objectives for requests without: per model and per priority.

[MODEL@]PRIORITY:ttft=MS,tpot=MS      PRIORITY is a number, or * for any; entries are separated by semicolons
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import ConfigError
from baton.spec import Objectives

LEAST_MS, MOST_MS = 1e-3, 1e9
"""The range of an objective, from a microsecond to eleven days. A request without one leaves it out."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`model` and `priority` are None where they may be any."""

    model: str | None
    priority: int | None
    objectives: Objectives


class Defaults:
    """The rules of a text; the most specific one wins, the model before the priority. Raises ConfigError naming
    `field`."""

    def __init__(self, text: str, field: str = "slo") -> None:
        entries = [entry.strip() for entry in text.split(";")]
        self._rules = [_parse(entry, field) for entry in entries if entry]

    def fill(self, given: Objectives, model: str, priority: int) -> Objectives:
        """The request's own objectives, and the defaults for those it lacks."""
        found = max(
            (rule for rule in self._rules if rule.model in (None, model) and rule.priority in (None, priority)),
            key=lambda rule: (rule.model is not None, rule.priority is not None),
            default=None,
        )
        if found is None:
            return given
        theirs = found.objectives
        return Objectives(
            theirs.ttft_ms if given.ttft_ms is None else given.ttft_ms,
            theirs.tpot_ms if given.tpot_ms is None else given.tpot_ms,
        )


def _parse(entry: str, field: str) -> Rule:
    def wrong(message: str) -> ConfigError:
        return ConfigError(f"{field}: {message} in {entry!r}; expected [MODEL@]PRIORITY:ttft=MS,tpot=MS")

    scope, colon, limits = entry.rpartition(":")
    model, at, priority = scope.rpartition("@")
    if not colon or not limits:
        raise wrong("no objectives")
    if at and not model:
        raise wrong("no model before @")
    if priority != "*" and not priority.removeprefix("-").isdecimal():
        raise wrong(f"priority {priority!r} is neither a whole number nor *")
    found: dict[str, float] = {}
    for limit in limits.split(","):
        name, equals, value = limit.strip().partition("=")
        if name not in ("ttft", "tpot") or not equals or name in found:
            raise wrong(f"{limit.strip()!r}")
        try:
            found[name] = float(value)
        except ValueError:
            raise wrong(f"{value!r} is no number") from None
        if not LEAST_MS <= found[name] <= MOST_MS:
            raise wrong(f"{name} must be from {LEAST_MS:g} to {MOST_MS:g} milliseconds")
    rank = None if priority == "*" else int(priority)
    return Rule(model or None, rank, Objectives(found.get("ttft"), found.get("tpot")))
