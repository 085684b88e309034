"""Fits the cost model to the real engine on this machine: `make cost-model` prints the JSON for `--cost-model`.

Prompts in chunks of several sizes, alone and after cached tokens, and decode steps of several widths and lengths, in
interleaved rounds on one core; least squares on relative errors over the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import numpy as np

from baton.cost import COEFFICIENTS, StepCost, StepShape, pairs
from baton.engine.api import Sequence, Work
from baton.engine.files.card import describe
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.load import load_engine
from baton.engine.stepper import Stepper
from baton.spec import Sampling

ROUNDS = 5
CHUNKS = [(new, cached) for new in (16, 64, 256, 512) for cached in (0, 1024)]
STEPS = [(sequences, tokens) for sequences in (1, 4, 16) for tokens in (64, 512, 1000)]
BLOCKS = 1100


def step_ms(engine: Stepper, works: list[tuple[int, int, int]]) -> float:
    """Milliseconds of a step over one (known, computed, to compute) tuple of token counts per sequence."""
    batch, block = [], 0
    for index, (known, computed, count) in enumerate(works):
        size = engine.layout.blocks_for(known)
        tokens = [(position * 7919 + index) % 40_000 + 100 for position in range(known)]
        blocks = list(range(block, block + size))
        batch.append(Work(Sequence(bytes(16), tokens, known, blocks, computed, Sampling(temperature=0.0)), count))
        block += size
    started = time.perf_counter()
    engine.step(batch)
    return (time.perf_counter() - started) * 1e3


def medians(engine: Stepper) -> tuple[list[float], list[float]]:
    """Milliseconds per case of `CHUNKS` and of `STEPS`."""
    chunks: list[list[float]] = [[] for _ in CHUNKS]
    steps: list[list[float]] = [[] for _ in STEPS]
    for _ in range(ROUNDS):
        for found, (new, cached) in zip(chunks, CHUNKS, strict=True):
            found.append(step_ms(engine, [(cached + new, cached, new)]))
        for found, (sequences, tokens) in zip(steps, STEPS, strict=True):
            found.append(step_ms(engine, [(tokens, tokens - 1, 1)] * sequences))
    return [statistics.median(found) for found in chunks], [statistics.median(found) for found in steps]


def fit(rows: list[list[float]], measured: list[float]) -> list[float]:
    """Coefficients of 0 or more: drops the most negative one and fits again."""
    weights = 1 / np.array(measured)
    kept = list(range(len(rows[0])))
    while True:
        columns = np.array(rows)[:, kept] * weights[:, None]
        found = np.linalg.lstsq(columns, np.ones(len(measured)), rcond=None)[0]
        if (found >= 0).all():
            return [float(found[kept.index(index)]) if index in kept else 0.0 for index in range(len(rows[0]))]
        del kept[int(found.argmin())]


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    engine = load_engine(describe(resolve(EMBEDDED_MODEL)), blocks=BLOCKS)
    engine.warm_up()
    prefill, decode = medians(engine)
    chunk = fit([[1.0, new, pairs(new, cached)] for new, cached in CHUNKS], prefill)
    step = fit([[1.0, sequences, sequences * tokens] for sequences, tokens in STEPS], decode)
    model = StepCost(*[float(f"{value / 1e3:.4g}") for value in (*chunk, *step)])
    print(json.dumps({name: getattr(model, name) for name in COEFFICIENTS}))
    for (new, cached), ms in zip(CHUNKS, prefill, strict=True):
        said = model.seconds(StepShape(new, pairs(new, cached))) * 1e3
        print(f"prefill {new} after {cached}: {ms:.2f} ms, model {said:.2f}", file=sys.stderr)
    for (sequences, tokens), ms in zip(STEPS, decode, strict=True):
        said = model.decode(sequences, sequences * tokens) * 1e3
        print(f"decode {sequences} of {tokens}: {ms:.2f} ms, model {said:.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
