"""What the engine remembers of a sequence between steps, kept in `Sequence.engine_state`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.engine.api import Sequence
from baton.engine.sampling.penalties import Penalties


@dataclass(slots=True)
class SequenceState:
    """`table` is `Sequence.blocks` as an int64 tensor on the CPU; `penalties` only where sampling needs them."""

    table: torch.Tensor
    penalties: Penalties | None


def state_of(sequence: Sequence) -> SequenceState:
    """The state, made at a sequence's first step; the block table follows blocks that were appended since."""
    state = sequence.engine_state
    if not isinstance(state, SequenceState):
        state = SequenceState(torch.tensor(sequence.blocks, dtype=torch.int64), Penalties.for_sampling(sequence))
        sequence.engine_state = state
    elif len(state.table) != len(sequence.blocks):
        state.table = torch.tensor(sequence.blocks, dtype=torch.int64)
    return state
