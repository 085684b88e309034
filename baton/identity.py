"""Who a process is: name, incarnation, host."""

from __future__ import annotations

import os
import socket
import uuid
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
