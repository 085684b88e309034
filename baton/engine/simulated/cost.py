"""The costs that a simulated worker can take: by name, or from a file for any other model or machine."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from baton.cost import COEFFICIENTS, StepCost
from baton.errors import ConfigError

COSTS = {
    # The embedded model with the native kernels on one AMD EPYC (Zen 4) core, 23 November 2026: the proportions are
    # those of `make cost-model` on a busy machine, all scaled to the 1.03 s that 1,000 tokens take on a quiet one.
    "smollm2-135m": StepCost(4.6e-3, 7.9e-4, 4.6e-7, 3.5e-3, 8.2e-4, 2.5e-6),
    # For loading everything around the model: 1 ms a step.
    "instant": StepCost(chunk=1e-3, step=1e-3),
}


def read_costs(name: str) -> StepCost:
    """A name of `COSTS`, or a JSON file with the six coefficients. Raises ConfigError that names the file and field."""
    if name in COSTS:
        return COSTS[name]
    try:
        given = json.loads(Path(name).expanduser().read_text())
        found = {field: float(given[field]) for field in COEFFICIENTS}
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cost_model: {name!r} is neither {' nor '.join(COSTS)} nor a file: {reason}") from None
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"cost_model: {name}: expected an object of {', '.join(COEFFICIENTS)}: {reason}") from None
    for field, value in found.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"cost_model: {name}: {field} must be 0 or more seconds, not {value}")
    return StepCost(**found)


def faster(costs: StepCost, factor: float) -> StepCost:
    """The same machine, `factor` times as fast."""
    return replace(costs, **{name: getattr(costs, name) / factor for name in COEFFICIENTS})
