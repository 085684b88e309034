"""What a launcher sees of a role's process, without a model: ready, told to stop, dying. `--model` says how to behave.

good       ready at once, stops on SIGTERM
corrupt    ends with status 2 and one line
crash      ends with a signal before it is ready
silent     is never ready
stubborn   is ready and ignores SIGTERM
chatty     writes a lot, then is ready
parent     is ready, and prints whether it has a process group of its own, and its parent's session
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from baton.children import die_with_parent
from baton.launch.lifetime import announce, leave_terminal

LONG_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--parent-pid", type=int)
    parser.add_argument("--name")
    parser.add_argument("--model", default="good")
    flags, rest = parser.parse_known_args()
    leave_terminal()
    die_with_parent(flags.parent_pid)
    behaviour = flags.model
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else lambda *_: sys.exit(0))
    if behaviour == "corrupt":
        print("something else", file=sys.stderr)
        print("baton: model.gguf: truncated", file=sys.stderr)
        sys.exit(2)
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "chatty":
        for index in range(20_000):
            print(f"line {index}", file=sys.stderr)
    if behaviour == "parent":
        own_group, parents_session = os.getpgrp() == os.getpid(), os.getsid(0) == os.getsid(os.getppid())
        print(f"own group: {own_group}; parent's session: {parents_session}; flags: {' '.join(rest)}", flush=True)
    if behaviour != "silent":
        announce(f"127.0.0.1:{os.getpid() % 50_000 + 1}", flags.role, flags.ready_fd)
    time.sleep(LONG_S)


if __name__ == "__main__":
    main()
