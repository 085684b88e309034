"""The cost of deterministic mode: a decode step's time beside the default mode's, on the same core."""

from __future__ import annotations

import os
import statistics

from baton.engine.files.card import describe
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.load import load_engine
from baton.engine.stepper import Stepper
from benchmarks.compute.cases import Case, run
from benchmarks.report import Row, spread

CASES = (Case("decode 1", 100, 1), Case("decode 16", 100, 16), Case("decode 64", 100, 64))
BLOCKS = 64 * 8
ROUNDS = 7
MOST = 1.5


def rows() -> list[Row]:
    """Medians over all steps of both modes, interleaved round by round."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        engines = {mode: _engine(mode) for mode in (True, False)}
        seconds: dict[tuple[Case, bool], list[float]] = {}
        for _ in range(ROUNDS):
            for case in CASES:
                for mode, engine in engines.items():
                    seconds.setdefault((case, mode), []).extend(run(engine, case))
    finally:
        os.sched_setaffinity(0, before)
    return [_row(case, seconds[case, True], seconds[case, False]) for case in CASES]


def _engine(deterministic: bool) -> Stepper:
    description = describe(resolve(EMBEDDED_MODEL), "bfloat16")
    engine = load_engine(description, blocks=BLOCKS, deterministic=deterministic)
    engine.warm_up()
    return engine


def _row(case: Case, deterministic: list[float], default: list[float]) -> Row:
    ours, theirs = statistics.median(deterministic) * 1e3, statistics.median(default) * 1e3
    name, target = f"deterministic: {case.name}", f"at most {MOST:g} x the default's"
    shown = spread([1e3 * one for one in deterministic])
    return Row(name, "ms a step", ours, "default mode", theirs, False, target, ours <= MOST * theirs, shown)
