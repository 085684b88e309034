"""The effect of a burst of long prompts on running streams: `make bench-burst [PEERS=DIR]`.

Eight streams decode when eight prompts of 1,000 tokens arrive at once. The figures are of the streams' gaps between
tokens that end between the burst's arrival and its last first token, by the client's clock, beside those of the same
streams in the same span without the burst. Rounds of both, of every mode and peer, are interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop

from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import LoadPlan, Planned
from baton.bench.sending.driver import LoadRun, LoadTarget, connect, run_plan
from benchmarks.report import Row, publish, spread
from benchmarks.serving.burst_peer import VllmBurst
from benchmarks.serving.modes import MODES, Mode

STREAMS, BURST = 8, 8
STREAM_PROMPT, BURST_PROMPT = 64, 1000
BURST_OUTPUT = 8
SETTLED_S = 2.0
"""From the streams' start to the burst; by then all of them decode."""
MARGIN = 1.4
"""The streams' length over the burst's expected one."""
CALM = 1.3
"""The bound on the p99 with the burst over the p99 without."""


@dataclass(frozen=True, slots=True)
class Round:
    """One run with the burst and one without; milliseconds."""

    calm_p99: float
    burst_p99: float
    burst_max: float
    ttft: tuple[float, ...]
    """Of the burst's prompts."""

    @property
    def ratio(self) -> float:
        return self.burst_p99 / self.calm_p99


def round_of(
    calm: Sequence[tuple[float, float]], burst: Sequence[tuple[float, float]], firsts: Sequence[float]
) -> Round:
    """A round from the (time, gap) of the streams' tokens in both runs and the times of the burst's first tokens, in
    seconds after its arrival."""
    end = max(firsts)
    spans = [[gap * 1e3 for at, gap in gaps if 0 < at <= end] for gaps in (calm, burst)]
    if any(max(at for at, _ in gaps) < end for gaps in (calm, burst)):
        raise RuntimeError(f"the streams ended before the burst did, whose last first token came after {end:.1f} s")
    p99 = [float(np.percentile(span, 99)) for span in spans]
    return Round(p99[0], p99[1], max(spans[1]), tuple(first * 1e3 for first in firsts))


class OurBurst:
    """The burst on a cluster of one mode."""

    def __init__(self, mode: Mode) -> None:
        self.name = mode.name
        self._mode = mode
        self._seed = 1

    async def round(self) -> Round:
        """Starts a cluster, measures its speed, and runs the streams without and with the burst."""
        self._seed += 10
        config = LoadConfig(seed=self._seed, timeout_s=240.0)
        async with self._mode.start() as address, connect(address, config) as target:
            tokens = await self._tokens_needed(target)
            calm = await self._run(target, tokens, burst=False)
            loaded = await self._run(target, tokens, burst=True)
        firsts = [record.stamps[0] - SETTLED_S for record in loaded.records[STREAMS:]]
        return round_of(_gaps(calm), _gaps(loaded), firsts)

    def close(self) -> None:
        """Nothing outlives a round."""

    async def _tokens_needed(self, target: LoadTarget) -> int:
        """The streams' length to outlast the burst, by the speed of both phases alone."""
        one_prompt = Planned(0, 0.0, BURST_PROMPT, 1)
        streams = [Planned(1 + index, 4.0, STREAM_PROMPT, 64) for index in range(STREAMS)]
        run = await run_plan(target, LoadPlan((one_prompt, *streams), 5.0), LoadConfig(seed=self._seed + 1))
        prefill_s = (run.records[0].ttft_ms or 0.0) / 1e3
        step_s = statistics.median(gap for record in run.records[1:] for gap in record.gaps_ms) / 1e3
        return round((SETTLED_S + BURST * prefill_s * MARGIN) / step_s)

    async def _run(self, target: LoadTarget, tokens: int, *, burst: bool) -> LoadRun:
        self._seed += 2  # fresh prompts: no prefix cache has them
        requests = [Planned(index, 0.0, STREAM_PROMPT, tokens) for index in range(STREAMS)]
        if burst:
            requests += [Planned(STREAMS + index, SETTLED_S, BURST_PROMPT, BURST_OUTPUT) for index in range(BURST)]
        run = await run_plan(target, LoadPlan(tuple(requests), 1.0), LoadConfig(seed=self._seed, timeout_s=240.0))
        failed = {record.status for record in run.records} - {"OK"}
        if failed:
            raise RuntimeError(f"{self.name}: requests ended with {', '.join(failed)}")
        return run


def _gaps(run: LoadRun) -> list[tuple[float, float]]:
    """(end after the burst's arrival, length) of each gap in the streams, seconds."""
    return [
        (after - SETTLED_S, after - before)
        for record in run.records[:STREAMS]
        for before, after in zip(record.stamps, record.stamps[1:], strict=False)
    ]


def rows_of(name: str, rounds: Sequence[Round]) -> list[Row]:
    """Medians of the rounds. Only the disaggregated mode has a target."""
    ratios = [found.ratio for found in rounds]
    ratio = statistics.median(ratios)
    calm, loaded = ([getattr(found, field) for found in rounds] for field in ("calm_p99", "burst_p99"))
    firsts = [statistics.median(found.ttft) for found in rounds]
    lasts = [max(found.ttft) for found in rounds]
    target = name == "disaggregated"
    bound = f"at most {CALM} x without" if target else ""
    return [
        Row(f"{name}: ITL p99 in the burst", "ms", statistics.median(loaded), "without the burst",
            statistics.median(calm), False, bound, ratio <= CALM if target else None, spread(loaded)),
        Row(f"{name}: ITL p99, burst over calm", "ratio", ratio, "", None, False, spread=spread(ratios)),
        Row(f"{name}: longest gap in the burst", "ms", statistics.median(found.burst_max for found in rounds), "", None,
            False, spread=spread([found.burst_max for found in rounds])),
        Row(f"{name}: TTFT of the burst, median", "ms", statistics.median(firsts), "", None, False,
            spread=spread(firsts)),
        Row(f"{name}: TTFT of the burst, last", "ms", statistics.median(lasts), "", None, False, spread=spread(lasts)),
    ]  # fmt: skip


async def measure(rounds: int, peers: Path | None) -> list[Row]:
    """All rounds of all modes and peers, interleaved."""
    subjects: list[OurBurst | VllmBurst] = [OurBurst(mode) for mode in MODES]
    if peers is not None:
        subjects.append(VllmBurst(peers))
    found: dict[str, list[Round]] = {subject.name: [] for subject in subjects}
    try:
        for _ in range(rounds):
            for subject in subjects:
                found[subject.name].append(await _round(subject))
    finally:
        for subject in subjects:
            subject.close()
    return [row for name, done in found.items() for row in rows_of(name, done)]


async def _round(subject: OurBurst | VllmBurst) -> Round:
    if isinstance(subject, VllmBurst):
        return round_of(*await asyncio.to_thread(subject.round))
    return await subject.round()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="the folder of setup.sh, with vLLM")
    options = parser.parse_args()
    sys.exit(0 if publish("burst", uvloop.run(measure(options.rounds, options.peers))) else 1)


if __name__ == "__main__":
    main()
