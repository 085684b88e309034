"""Baton's command line in a process that speaks other versions: `python -m tests.launch.speaking LEAST MOST ...`."""

from __future__ import annotations

import sys

from baton.cli.app import main
from baton.rpc import greeting

if __name__ == "__main__":
    least, most = map(int, sys.argv[1:3])
    del sys.argv[1:3]
    greeting.SPOKEN = greeting.Versions(least, most)
    sys.exit(main())
