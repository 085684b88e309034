"""Two network namespaces with a cable between them, where the machine lets us make them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000


def enter(name: str) -> None:
    """Moves the calling thread, and all that it starts later, into a network namespace."""
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter network namespace {name}")
    finally:
        os.close(fd)


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
