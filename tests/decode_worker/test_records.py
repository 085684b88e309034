"""What the decode role keeps of a sequence."""

from __future__ import annotations

from typing import Any, cast

from baton.spec import HandoffKey, Sampling, SequenceSpec
from decode_worker.records import PromptHere, Resident
from kvtransfer.blocks.admission import Need, Room


def test_steps_that_a_cancel_overtook_leave_no_negative_work() -> None:
    """Its tokens are no longer noted here, and the engine has gone on: a load report counts none of it."""
    nobody, prompt = cast(Any, None), (1,) * 20
    spec = SequenceSpec(
        attempt=bytes(16), request_id="r", prompt=prompt, sampling=Sampling(), max_tokens=8, router=nobody
    )
    here = PromptHere(Room((1, 2), 0), [], 0.0, 0.0)
    resident = Resident(
        HandoffKey(spec.attempt, 0), spec, Need.of(spec), nobody, list(spec.prompt), 0.0, 0.0, 27, prompt=here
    )
    assert resident.uncomputed == 0
    resident.computed = 12
    assert resident.uncomputed == 8
