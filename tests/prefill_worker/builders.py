"""Sequences and attempts for tests that need no cluster."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

from baton.engine.api import Sequence
from baton.spec import ProcessRef, Sampling, SequenceSpec
from baton.worker.service import RouterSession
from prefill_worker.attempt import Attempt

ROUTER = ProcessRef("r", "r-1", "here")
_numbers = itertools.count()


def spec(prompt: int = 5, **fields: Any) -> SequenceSpec:
    """A sequence with a key of its own."""
    key = next(_numbers).to_bytes(16, "little")
    made = SequenceSpec(key, "test", tuple(range(prompt)), Sampling(), fields.pop("max_tokens", 4), ROUTER)
    return replace(made, **fields)


def sequence(prompt: int = 5, computed: int = 0) -> Sequence:
    """As the engine gets it."""
    return Sequence.from_spec(spec(prompt), [0], computed)


def attempt(prompt: int = 5, **fields: Any) -> Attempt:
    """Nobody's; it says nothing to a router."""
    return Attempt(spec(prompt, **fields), cast(RouterSession, None))
