"""Sequences and attempts for tests that need no cluster."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

from baton.engine.api import Sequence
from baton.spec import ProcessRef, Sampling, SequenceSpec
from baton.worker.session import RouterSession
from prefill_worker.prompt import Prompt

ROUTER = ProcessRef("r", "r-1", "here")
_numbers = itertools.count()


def spec(prompt: int = 5, **fields: Any) -> SequenceSpec:
    """A sequence with a key of its own."""
    key = next(_numbers).to_bytes(16, "little")
    made = SequenceSpec(
        attempt=key,
        request_id="test",
        prompt=tuple(range(prompt)),
        sampling=Sampling(),
        max_tokens=fields.pop("max_tokens", 4),
        router=ROUTER,
    )
    return replace(made, **fields)


def sequence(prompt: int = 5, computed: int = 0) -> Sequence:
    """As the engine gets it, with more blocks than it will need."""
    return Sequence.from_spec(spec(prompt), list(range(1000)), computed)


def waiting(prompt: int = 5, **fields: Any) -> Prompt:
    """A prompt of no router."""
    return Prompt(spec(prompt, **fields), cast(RouterSession, None))
