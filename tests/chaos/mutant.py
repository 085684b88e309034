"""Baton's command line with a fault: `python -m tests.chaos.mutant FAULT[,FAULT] ROLE ...`.

repeats            the router forgets the last token that it delivered before a failover, so that it comes twice
shifts             a sequence that goes on elsewhere does so one position too far
forgets_seed       a sequence that goes on elsewhere has another seed
forgets_penalties  a sequence that goes on elsewhere has no penalties
leaks              a worker keeps one block in every so many releases
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from baton.cli.app import main
from baton.spec import RequestSpec, SequenceSpec
from kvtransfer.blocks.pool import BlockPool
from router.requests.failover import Continuation

EVERY = 10
"""Releases, of which one leaks."""


def repeats() -> None:
    start_next = Continuation._start_next

    def forgetful(self: Any, *arguments: Any, **named: Any) -> None:
        ids = self._request._output._ids
        if ids:
            ids.pop()
        return start_next(self, *arguments, **named)

    Continuation._start_next = forgetful  # type: ignore[method-assign]


def continued(change: Callable[[SequenceSpec], SequenceSpec]) -> None:
    """Sequences that go on after tokens of a former attempt are sent to their workers with this change."""
    attempted = RequestSpec.attempted

    def changed(self: RequestSpec, *arguments: Any, **named: Any) -> SequenceSpec:
        spec = attempted(self, *arguments, **named)
        return change(spec) if spec.output else spec

    RequestSpec.attempted = changed  # type: ignore[method-assign]


def shifts() -> None:
    def further(spec: SequenceSpec) -> SequenceSpec:
        output = (*spec.output, spec.output[-1])
        return replace(spec, output=output) if len(output) < spec.max_tokens else spec

    continued(further)


def forgets_seed() -> None:
    continued(lambda spec: replace(spec, sampling=replace(spec.sampling, seed=spec.sampling.seed ^ 1)))


def forgets_penalties() -> None:
    none = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    continued(lambda spec: replace(spec, sampling=replace(spec.sampling, **none)))  # type: ignore[arg-type]


def leaks() -> None:
    release, numbers = BlockPool.release, itertools.count(1)

    def leaky(self: BlockPool, blocks: Sequence[int]) -> None:
        release(self, blocks[:-1] if len(blocks) > 1 and next(numbers) % EVERY == 0 else blocks)

    BlockPool.release = leaky  # type: ignore[method-assign]


FAULTS = {fault.__name__: fault for fault in (repeats, shifts, forgets_seed, forgets_penalties, leaks)}

if __name__ == "__main__":
    for name in sys.argv.pop(1).split(","):
        FAULTS[name]()
    sys.exit(main())
