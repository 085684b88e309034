"""The counters that stay zero in a healthy cluster, as docs/operations.md marks them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

OPERATIONS = Path(__file__).parents[1] / "docs" / "operations.md"


def alarms() -> set[str]:
    """Their names."""
    found = set(re.findall(r"`([a-z_]+)` !", OPERATIONS.read_text()))
    assert {"writes_failed", "writes_refused", "late_steps", "cache_gaps"} <= found, "the search finds them"
    return found


def raised(counts: Mapping[str, int]) -> dict[str, int]:
    """Those of them that are not zero."""
    return {name: counts[name] for name in sorted(alarms()) if counts.get(name)}
