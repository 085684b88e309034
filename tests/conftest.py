"""What every test relies on."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background we ignore Ctrl-C, and our children would inherit that; tests send it to them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
