"""The independent reference: `transformers`, in float32, on the very same weights."""

from __future__ import annotations

from functools import cache
from typing import Any

from baton.engine.files.models import EMBEDDED_MODEL, resolve
from benchmarks.quality.fidelity import reference_model


@cache
def embedded_reference() -> Any:
    """The embedded model, from the user's own cache; loaded once for all tests, so none may change it."""
    return reference_model(resolve(EMBEDDED_MODEL))
