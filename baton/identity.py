"""Who a process is: name, incarnation, host, and the fingerprint of what its KV blocks mean."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from baton.spec import AttemptKey, ProcessRef


def mint_process(role: str, address: str, name: str = "") -> ProcessRef:
    """A new incarnation. The default name says role, host and process id."""
    return ProcessRef(name or f"{role}-{socket.gethostname()}-{os.getpid()}", str(uuid.uuid4()), address)


def mint_attempt() -> AttemptKey:
    """A key that no other attempt has, here or anywhere."""
    return os.urandom(16)


@cache
def host_id() -> str:
    """Equal for two processes that share a kernel and a network namespace, so that shared memory can work.

    The boot id tells machines apart; the namespace tells containers apart that share one kernel.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return str(uuid.uuid4())  # unknown: never equal to anybody's, so shared memory is not tried
    return f"{boot}:{namespace}:{os.getuid()}"


def extended_fingerprint(base: str, facts: Mapping[str, str]) -> str:
    """`base/name=value/...`: equal only where all the facts are too. They stay legible: a mismatch names one."""
    return "/".join((base, *(f"{name}={value}" for name, value in facts.items())))


def fingerprint_difference(ours: str, theirs: str) -> tuple[str, str, str]:
    """What differs between two fingerprints, ours and theirs: a fact by its name, or "fingerprint" for the rest."""
    (base, *mine), (other_base, *other) = ours.split("/"), theirs.split("/")
    if base != other_base:
        return "fingerprint", base, other_base
    if bool(mine) != bool(other):
        return "deterministic", str(bool(mine)).lower(), str(bool(other)).lower()
    for left, right in zip(mine, other, strict=False):
        (name, _, value), (other_name, _, other_value) = left.partition("="), right.partition("=")
        if name == other_name and value != other_value:
            return name, value, other_value
    return "fingerprint", ours, theirs
