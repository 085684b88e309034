"""How a command ends that failed: one line on stderr and a status."""

from __future__ import annotations

import os
import sys
import traceback

from baton.errors import BatonError, ConfigError, FieldError

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
DEBUG = "BATON_DEBUG"
"""An environment variable: when it is not empty, errors come with their traceback."""


def line_of(error: BaseException) -> str:
    if isinstance(error, BatonError):
        text = str(error) or type(error).__name__
    elif isinstance(error, OSError):
        text = ": ".join(filter(None, [str(error.filename or ""), (error.strerror or str(error)).lower()]))
    else:
        text = f"internal error: {type(error).__name__}: {error} ({DEBUG}=1 shows where)"
    return " ".join(text.split())


def report(error: BaseException) -> int:
    """Prints the line, and if asked the traceback. Returns 130 for Ctrl-C, 2 where other flags would help, else 1."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    print(f"baton: {line_of(error)}", file=sys.stderr, flush=True)
    return USAGE if isinstance(error, (FieldError, ConfigError)) else FAILURE
