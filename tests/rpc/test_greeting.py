"""What two processes settle first: the version, and whom a greeting is meant for."""

from __future__ import annotations

import pytest

from baton.errors import Mismatch
from baton.rpc import greeting
from baton.rpc.greeting import Versions, agree_on_version, check_receiver, with_versions
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 2), (1, 1), 1),
        ((1, 2), (2, 3), 2),
        ((1, 3), (1, 2), 2),
        ((2, 5), (3, 4), 4),
        ((1, 2), (0, 0), 1),
        ((2, 3), (1, 1), None),
        ((1, 1), (2, 3), None),
        ((2, 3), (0, 0), None),
        ((1, 2), (2, 1), None),
    ],
)
def test_the_highest_version_that_both_speak(
    monkeypatch: pytest.MonkeyPatch, ours: tuple[int, int], theirs: tuple[int, int], agreed: int | None
) -> None:
    monkeypatch.setattr(greeting, "SPOKEN", Versions(*ours))
    hello = wire.Hello(version_min=theirs[0], version_max=theirs[1])
    if agreed is not None:
        assert agree_on_version(hello) == agreed
        return
    with pytest.raises(Mismatch, match="protocol version differs") as refusal:
        agree_on_version(hello)
    assert refusal.value.field == "version"


def test_a_message_names_our_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "SPOKEN", Versions(3, 7))
    request = with_versions(wire.RegisterRequest())
    assert (request.version_min, request.version_max) == (3, 7)


def test_a_greeting_for_another_process_is_refused() -> None:
    own = ProcessRef("w", "mine", "here:1")
    check_receiver("mine", own)
    check_receiver("", own)  # from a process that does not name its receiver
    with pytest.raises(Mismatch) as refusal:
        check_receiver("another's", own)
    assert refusal.value.field == "receiver"
