"""What travels comes out as it went in."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidArgument
from baton.rpc.convert import (
    logprobs_from_wire,
    logprobs_to_wire,
    process_from_wire,
    process_to_wire,
    retry_after_from_wire,
    spec_from_wire,
    spec_to_wire,
)
from baton.spec import Objectives, ProcessRef, Sampling, SequenceSpec, TokenLogprobs
from baton.v1 import transfer_pb2 as transfer
from baton.v1 import worker_pb2 as wire

FLOATS = st.floats(0, 2, width=32)
IDS = st.integers(0, 2**32 - 1)
SAMPLING = st.builds(
    Sampling,
    temperature=FLOATS,
    top_k=IDS,
    top_p=FLOATS,
    min_p=FLOATS,
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=FLOATS,
    presence_penalty=FLOATS,
    frequency_penalty=FLOATS,
    logprobs=st.none() | st.integers(0, 20),
)
PROCESS = st.builds(ProcessRef, st.text(), st.text(), st.text())
SPECS = st.builds(
    SequenceSpec,
    attempt=st.binary(min_size=16, max_size=16),
    request_id=st.text(),
    prompt=st.lists(IDS, min_size=1, max_size=8).map(tuple),
    sampling=SAMPLING,
    max_tokens=st.integers(9, 2**32 - 1),
    router=PROCESS,
    output=st.lists(IDS, max_size=8).map(tuple),
    stop_token_ids=st.frozensets(IDS, max_size=4),
    eos_token_ids=st.frozensets(IDS, max_size=4),
    objectives=st.builds(Objectives, st.none() | st.floats(1, 1e6), st.none() | st.floats(1, 1e6)),
    priority=st.integers(-(2**31), 2**31 - 1),
    tenant_salt=st.text(),
)


@given(SPECS, st.none() | st.floats(0, 1e6))
def test_a_spec_comes_out_as_it_went_in(spec: SequenceSpec, deadline_s: float | None) -> None:
    message = wire.SequenceSpec.FromString(spec_to_wire(replace(spec, deadline_s=deadline_s)).SerializeToString())
    found = spec_from_wire(message)
    assert replace(found, deadline_s=None) == spec
    assert found.deadline_s == (None if deadline_s is None else pytest.approx(deadline_s))


@given(PROCESS)
def test_a_process_comes_out_as_it_went_in(process: ProcessRef) -> None:
    assert process_from_wire(process_to_wire(process)) == process


def test_logprobs_come_out_as_they_went_in() -> None:
    (third,) = struct.unpack("f", struct.pack("f", -1 / 3))
    logprobs = TokenLogprobs(third, ((5, third), (6, -2.0)))
    assert logprobs_from_wire(logprobs_to_wire(logprobs)) == logprobs


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"attempt": b"short"}, "spec.attempt"),
        ({"prompt_tokens": []}, "spec.prompt_tokens"),
        ({"max_tokens": 2, "output_tokens": [1, 2]}, "spec.max_tokens"),
        ({"max_tokens": 0}, "spec.max_tokens"),
    ],
)
def test_a_spec_that_no_router_sends_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    fields: dict[str, object] = {"attempt": b"x" * 16, "prompt_tokens": [1], "max_tokens": 1}
    with pytest.raises(InvalidArgument) as caught:
        spec_from_wire(wire.SequenceSpec(**(fields | changes)))  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0])
@pytest.mark.parametrize("field", ["deadline_ms", "ttft_left_ms", "slo.ttft_ms", "slo.tpot_ms"])
def test_what_is_no_time_is_refused_with_its_field(field: str, value: float) -> None:
    message = wire.SequenceSpec(attempt=b"a" * 16, prompt_tokens=[1], max_tokens=1)
    spec_from_wire(message)
    parent, _, name = field.rpartition(".")
    setattr(message.slo if parent else message, name, value)
    if field == "ttft_left_ms" and value == -1.0:
        assert spec_from_wire(message).ttft_left_s == -0.001, "it is late"
        return
    with pytest.raises(InvalidArgument) as caught:
        spec_from_wire(message)
    assert caught.value.field == f"spec.{field}"


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, None), (0.0, 0.0), (20.0, 0.02), (-1.0, None), (float("nan"), None), (float("inf"), None)],
)
def test_a_senseless_pause_counts_as_none(given: float | None, found: float | None) -> None:
    for message in (wire.HandoffFailed(retry_after_ms=given), transfer.Refused(retry_after_ms=given)):
        assert retry_after_from_wire(message) == found
