"""What two processes settle before either has an effect on the other: whom a greeting is meant for, and the version.

A process names the range of versions that it speaks, and two processes use the highest that both speak. So a pool can
be upgraded one process at a time, as long as neighbouring releases have a version in common.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from baton.errors import Mismatch
from baton.spec import ProcessRef

RECEIVER = "receiver"
"""The field of the Mismatch that another process than the intended one raises."""


class Versions(NamedTuple):
    """From `least` to `most`, both included."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


SPOKEN = Versions(1, 1)
"""By this release. Read at each use, so that a process can be started with another range in tests."""


class Ranged(Protocol):
    """A message that names a range."""

    version_min: int
    version_max: int


R = TypeVar("R", bound=Ranged)


def with_versions(message: R) -> R:
    """The message, which names our range from now on."""
    message.version_min, message.version_max = SPOKEN
    return message


def agree_on_version(theirs: Ranged) -> int:
    """The highest version that both speak. Raises Mismatch where there is none. A process that names no range is older
    than ranges, and speaks version 1."""
    given = Versions(theirs.version_min or 1, theirs.version_max or 1)
    version = min(SPOKEN.most, given.most)
    if version < max(SPOKEN.least, given.least):
        raise Mismatch("version", str(SPOKEN), str(given), f"protocol version differs: here {SPOKEN}, there {given}")
    return version


def check_receiver(incarnation: str, own: ProcessRef) -> None:
    """Raises Mismatch where a greeting is meant for another process. Without an incarnation it is meant for any."""
    if incarnation and incarnation != own.incarnation:
        text = f"this is {own.name} ({own.incarnation[:8]}), not the process that was meant ({incarnation[:8]})"
        raise Mismatch(RECEIVER, own.incarnation, incarnation, text)
