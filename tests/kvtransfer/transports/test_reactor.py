"""The thread that waits on descriptors, in a process that is suspended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

CHILD = """
import os, sys, threading
from kvtransfer.transports.reactor import Reactor

descriptor, said, reactor = int(sys.argv[1]), threading.Event(), Reactor("test")

def say(word):
    print(word, flush=True)
    said.set()

def ready(events):
    os.read(descriptor, 1)
    reactor.limit(descriptor, None)
    say("read")

def begin():
    reactor.watch(descriptor, ready, lambda: say("late"))
    reactor.limit(descriptor, 0.3)
    print("armed", flush=True)

reactor.call(begin)
said.wait(10.0)
os._exit(0)
"""


def test_input_that_came_while_the_process_was_suspended_counts_before_a_deadline() -> None:
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(reading)], stdout=subprocess.PIPE, pass_fds=(reading,), text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "armed\n"
        child.send_signal(signal.SIGSTOP)
        os.write(writing, b"x")
        time.sleep(0.5)
        child.send_signal(signal.SIGCONT)
        assert child.stdout.readline() == "read\n"
    finally:
        child.kill()
        child.communicate()
        os.close(reading)
        os.close(writing)
