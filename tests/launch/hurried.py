"""Baton's command line in a process of tenfold haste: `python -m tests.launch.hurried ...`.

Timeouts are a tenth of the real ones, and a router is behind after an eighth of the frames.
"""

from __future__ import annotations

import sys

from baton.rpc import awake, link, net

TIMES = 10.0
LEASES = {"router": "0.6", "decode": "0.5"}
"""`--lease-s`, by role."""

for module, names in (
    (link, ("HEARTBEAT_S", "SILENCE_S", "GRACE_S")),
    (awake, ("TICK_S", "LATE_S", "CATCH_UP_S")),
):
    for name in names:
        setattr(module, name, getattr(module, name) / TIMES)
net.WATCHFUL[:] = [
    (name, value if name == "grpc.keepalive_permit_without_calls" else int(value / TIMES))
    for name, value in net.WATCHFUL
]

if __name__ == "__main__":
    from baton.cli.app import main  # only now: others take these times by name
    from baton.worker import session

    session.BACKLOG_FRAMES, session.CAUGHT_UP_FRAMES = 256, 32

    role = sys.argv[1]
    if role in LEASES:
        sys.argv += ["--lease-s", LEASES[role]]
    sys.exit(main())
