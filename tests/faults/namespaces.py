"""Network namespaces with a cable between them, and PID namespaces, where the machine lets us make them.

As a program it runs a command, in a PID namespace of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET, CLONE_NEWPID = 0x40000000, 0x20000000
PR_SET_PDEATHSIG = 1


def enter(name: str) -> None:
    """Moves the calling thread, and all that it starts later, into a network namespace."""
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter network namespace {name}")
    finally:
        os.close(fd)


def why_no_pids() -> str:
    """Why PID namespaces can't be had here; empty where they can."""
    try:
        done = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return "the unshare command is not installed"
    return done.stderr.strip() if done.returncode else ""


def own_pids() -> None:
    """Goes on in a child, the first process of a new PID namespace; this process passes signals on, and ends as the
    child does. For a process with one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "can't make a PID namespace")
    child = os.fork()
    if not child:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


class NotPermitted(Exception):
    """The machine does not let us make namespaces; says why."""


class Cable:
    """Two namespaces, `names`, which see each other at `addresses`."""

    def __init__(self) -> None:
        tag = f"{os.getpid() % 100_000:05d}"
        self.names = (f"baton-a{tag}", f"baton-b{tag}")
        self.links = (f"bta{tag}", f"btb{tag}")
        self.addresses = ("10.231.7.1", "10.231.7.2")

    def plug(self) -> None:
        """Sets the link up; what was cut off goes on."""
        _ip("-n", self.names[0], "link", "set", self.links[0], "up")

    def pull(self) -> None:
        """From now on nothing passes, and neither side is told."""
        _ip("-n", self.names[0], "link", "set", self.links[0], "down")

    def lay(self) -> None:
        """Makes both ends."""
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        near, far = self.links
        _ip("-n", self.names[0], "link", "add", near, "type", "veth", "peer", "name", far, "netns", self.names[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")

    def remove(self) -> None:
        """The links go with their namespaces."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False)


@contextmanager
def cable() -> Iterator[Cable]:
    """Two namespaces; raises `NotPermitted` where they can't be had."""
    made = Cable()
    try:
        made.lay()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        raise NotPermitted("the ip command is not installed") from None
    if done.returncode:
        raise NotPermitted(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


if __name__ == "__main__":
    own_pids()
    command = sys.argv[1:]
    if "--parent-pid" in command:
        command[command.index("--parent-pid") + 1] = "0"  # how a parent in another PID namespace is seen
    os.execv(command[0], command)
