"""Our engine beside the peers: `make bench-engine [PEERS=DIR]`, or python -m benchmarks.compute.engine [--peers DIR].

All runs are interleaved on one core, round by round, and each number is the median of its rounds. In each turn, ours or
a peer's, an untimed run of the case directly precedes the timed one: after another engine's turn the memory is cold.
Without peers the rows have our rates and their share of the hardware's limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from baton.config import WeightChoice
from baton.engine.files.card import describe
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.native.engine import NativeEngine
from benchmarks.compute import limits, peers
from benchmarks.compute.cases import BLOCKS, CASES, Case, run
from benchmarks.report import Row, publish, spread

READY = "start to ready"
READY_LIMIT_S = 5.0
# The least ratio to a peer. A case that is missing here has no target.
TARGETS = {
    ("prefill 1024", "vllm"): 1.4,
    ("prefill 4096", "vllm"): 1.4,
    ("decode 1", "llama.cpp"): 2.0,
    ("decode 1", "llama.cpp native"): 2.0,
    ("decode 1", "vllm"): 3.0,
    ("decode 16, short", "vllm"): 3.0,
    ("decode 16, 1000 tokens", "vllm"): 2.0,
}
BF16_TARGETS = {("decode 16, short", "vllm"): 1.4}


@dataclass(frozen=True, slots=True)
class EngineFormat:
    """The formats of one of our engines."""

    weights: WeightChoice
    kv_dtype: str

    @property
    def name(self) -> str:
        return f"{self.weights} weights, {'8-bit' if self.kv_dtype == 'int8' else 'bf16'} KV"


FORMATS = (EngineFormat("auto", "auto"), EngineFormat("auto", "int8"), EngineFormat("bf16", "auto"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="the folder of setup.sh")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument(
        "--only", action="append", choices=[case.name for case in CASES], help="a case; all if not given"
    )
    parser.add_argument("--peer", action="append", choices=peers.NAMES, help="a peer; all if not given")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.cpu})
    others = peers.start(options.peers, options.cpu, options.peer or list(peers.NAMES)) if options.peers else []
    try:
        rows = compare(others, options.rounds, [case for case in CASES if case.name in (options.only or [case.name])])
    finally:
        for peer in others:
            peer.close()
    sys.exit(0 if publish("engine", rows) else 1)


def compare(others: list[peers.Peer], rounds: int, cases: list[Case]) -> list[Row]:
    """Measures our engines and the peers."""
    for peer in others:
        print(f"{peer.name}: {peer.about}", flush=True)
    hardware = limits.measure()
    engines = {form: _engine(form) for form in FORMATS}
    ours: dict[tuple[str, EngineFormat], list[float]] = {}
    theirs: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        hardware = hardware.or_better(limits.measure())
        for case in cases:
            for form, engine in engines.items():
                run(engine, case)  # after another engine's turn the memory is cold
                seconds = statistics.median(run(engine, case))
                ours.setdefault((case.name, form), []).append(case.rate(seconds))
            for peer in others:
                peer.ask(case.name, case.tokens, case.sequences)
                if (rate := peer.ask(case.name, case.tokens, case.sequences)) is not None:
                    theirs.setdefault((case.name, peer.name), []).append(rate)
    print(f"one core: {hardware}", flush=True)
    for (name, peer_name), values in theirs.items():
        print(f"{peer_name}, {name}: {spread(values)}", flush=True)
    rows = []
    for case in cases:
        for form, engine in engines.items():
            rates = ours[case.name, form]
            best = case.rate(hardware.seconds(engine, case, form.weights != "bf16"))
            found = {
                p.name: statistics.median(theirs[case.name, p.name]) for p in others if (case.name, p.name) in theirs
            }
            rows += [_row(case, form, rates, best, peer, value) for peer, value in (found.items() or [("", None)])]
    return rows + _ready_rows(others)


def _engine(form: EngineFormat) -> NativeEngine:
    description = describe(resolve(EMBEDDED_MODEL), "bfloat16", kv_dtype=form.kv_dtype)
    engine = NativeEngine.load(description, blocks=BLOCKS, weights=form.weights)
    engine.warm_up()
    return engine


def _row(case: Case, form: EngineFormat, rates: list[float], limit: float, peer: str, theirs: float | None) -> Row:
    # Targets are for the fastest format within the quality bounds.
    best = EngineFormat("auto", "int8" if case.name.endswith("1000 tokens") else "auto")
    target = TARGETS.get((case.name, peer)) if form == best else None
    if form.weights == "bf16":
        target = BF16_TARGETS.get((case.name, peer))
    rate = statistics.median(rates)
    met = None if theirs is None or target is None else rate / theirs >= target
    return Row(case.name, "tokens/s", rate, peer, theirs, True, f"at least {target:g} x" if target else "", met,
               spread(rates), form.name, rate / limit)  # fmt: skip


def _ready_rows(others: list[peers.Peer]) -> list[Row]:
    code = "import sys; from benchmarks.compute.engine import FORMATS, _engine; _engine(FORMATS[0])"
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - started)
    ours, form = statistics.median(times), FORMATS[0].name
    met = ours <= READY_LIMIT_S
    rows = [Row(READY, "s", ours, "", None, False, f"at most {READY_LIMIT_S:g} s", met, spread(times), form)]
    return rows + [Row(READY, "s", ours, peer.name, peer.ready_s, False, format=form) for peer in others]


if __name__ == "__main__":
    main()
