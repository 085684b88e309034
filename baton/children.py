"""A child process of ours: how it finds this very Baton, and that it dies with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import sysconfig
from pathlib import Path

import baton
from baton.errors import ConfigError, Unavailable

PYTHON = (sys.executable, "-P", "-m")
"""Runs the module that follows. -P: nothing is imported from the working directory."""
PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child finds this very Baton, also from an uninstalled checkout."""
    environment = dict(os.environ)
    root = str(Path(baton.__file__).parents[1])
    if root != sysconfig.get_path("purelib"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that started it ends. Raises Unavailable where the parent has
    died before the call, and ConfigError on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("parent-pid: only on Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise ConfigError(f"parent-pid: prctl failed: {os.strerror(ctypes.get_errno()).lower()}")
    if os.getppid() != parent_pid:
        raise Unavailable(f"the parent process {parent_pid} is gone")
