"""Identities: a process's name and incarnation, its host, attempts, fingerprints."""

from __future__ import annotations

import os
import secrets
import socket
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from baton.spec import AttemptKey, ProcessRef


def mint_process(role: str, address: str, name: str = "") -> ProcessRef:
    """A new incarnation. The default name has something random: two containers may both have process id 1."""
    return ProcessRef(name or f"{role}-{socket.gethostname()}-{secrets.token_hex(4)}", str(uuid.uuid4()), address)


def mint_attempt() -> AttemptKey:
    """A random key, unique across all processes."""
    return os.urandom(16)


@cache
def host_id() -> str:
    """Equal for two processes that can share memory: the boot id tells machines apart, the network namespace containers
    on one kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return str(uuid.uuid4())  # unknown: equal to no other, so that shared memory is not tried
    return f"{boot}:{namespace}:{os.getuid()}"


def extended_fingerprint(base: str, facts: Mapping[str, str]) -> str:
    """`base/name=value/...`, equal only for equal facts, which stay legible so that a mismatch can name one."""
    return "/".join((base, *(f"{name}={value}" for name, value in facts.items())))


def fingerprint_difference(ours: str, theirs: str) -> tuple[str, str, str]:
    """The first difference, with our value and theirs: a fact by its name, else "fingerprint"."""
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
