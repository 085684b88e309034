"""The plan of a run: every request with its time, lengths and class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from baton.bench.schedule.arrivals import arrival_times, profile_of
from baton.bench.schedule.classes import TrafficClass
from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.lengths import parse_lengths
from baton.bench.schedule.traces import TraceRequest, mean_rate, read_trace, scaled
from baton.errors import ConfigError

LENGTHS_STREAM, CLASSES_STREAM, PROMPTS_STREAM, BLOCKS_STREAM = 2, 3, 4, 5
FIRST_ORDINARY_TOKEN = 256
"""Vocabularies keep control tokens below it."""
MOST_REQUESTS = 1_000_000
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's step."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A request due `at_s` seconds after the start. `blocks` as in `TraceRequest`."""

    index: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    traffic: TrafficClass = field(default_factory=TrafficClass)
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Requests in order of time. Those due before `warmup_s` are not counted; the window ends at `end_s`."""

    requests: tuple[Planned, ...]
    end_s: float
    warmup_s: float = 0.0
    clipped: int = 0
    """Requests shortened to fit the model's context."""

    @property
    def window_s(self) -> float:
        """Seconds in which counted requests are due."""
        return self.end_s - self.warmup_s


def make_plan(config: LoadConfig, context_tokens: int) -> LoadPlan:
    """Reads the trace, if any, and draws the rest. Raises ConfigError for a plan without counted requests."""
    entries = read_trace(config.trace, config.trace_format) if config.trace is not None else []
    times = _trace_times(config, entries) if config.arrival_kind == "trace" else _drawn_times(config)
    limit = config.requests or MOST_REQUESTS
    # One more than is sent: a window that --requests cuts off ends when the next request would have been due.
    due = list(itertools.islice(times, limit + 1))
    end_s = due[limit] if len(due) > limit and due[limit] > due[limit - 1] else _duration(config, entries, due[:limit])
    lengths = _lengths(config, entries)
    requests = [
        Planned(index, at_s, entry.prompt_tokens, entry.output_tokens, traffic, entry.blocks, entry.block_tokens)
        for index, (at_s, entry, traffic) in enumerate(zip(due[:limit], lengths, _classes(config), strict=False))
    ]
    if not any(request.at_s >= config.warmup_s for request in requests):
        window = f"from {config.warmup_s:g} s to {end_s:g} s"
        raise ConfigError(f"seconds: no request is due {window}; send longer or faster")
    fitted = tuple(_fit(request, context_tokens) for request in requests)
    clipped = sum(after != before for after, before in zip(fitted, requests, strict=True))
    return LoadPlan(fitted, end_s, config.warmup_s, clipped)


def _drawn_times(config: LoadConfig) -> Iterator[float]:
    """With a limit on the requests, the window's number of them is left open."""
    window_s = None if config.requests is not None else config.seconds
    times = arrival_times(profile_of(config), config.burstiness, config.seed, window_s)
    return itertools.takewhile(lambda at_s: at_s < config.seconds, times)


def _trace_times(config: LoadConfig, entries: Sequence[TraceRequest]) -> Iterator[float]:
    stretch = config.time_scale
    if config.rate is not None:
        stretch = mean_rate(entries) / config.rate
        if not stretch:
            raise ConfigError("rate: the trace has no duration to scale; its requests all have one time")
    return itertools.takewhile(lambda at_s: at_s < config.seconds, (entry.at_s * stretch for entry in entries))


def _duration(config: LoadConfig, entries: Sequence[TraceRequest], due: Sequence[float]) -> float:
    """The window's end in a run that no further request ends: steps or a trace may end before `seconds`. A trace's last
    request gets the mean gap of the others, unless all come at once."""
    if config.arrival_kind == "steps":
        return min(config.seconds, profile_of(config).seconds)
    is_over = len(due) in (len(entries), config.requests)
    if config.arrival_kind == "trace" and is_over and due[-1] > 0:
        return min(config.seconds, due[-1] * len(due) / (len(due) - 1))
    return config.seconds


def _lengths(config: LoadConfig, entries: Sequence[TraceRequest]) -> Iterator[TraceRequest]:
    """Endless: a trace starts over, for arrivals that do not use its times."""
    if entries:
        yield from itertools.cycle([scaled(entry, config.length_scale) for entry in entries])
    rng = np.random.default_rng([config.seed, LENGTHS_STREAM])
    prompt = parse_lengths(config.prompt_tokens, "prompt_tokens")
    output = parse_lengths(config.output_tokens, "output_tokens")
    while True:
        yield TraceRequest(0.0, prompt.draw(rng), output.draw(rng))


def _classes(config: LoadConfig) -> Iterator[TrafficClass]:
    classes = config.traffic_classes()
    bounds = np.cumsum([entry.weight for entry in classes])
    rng = np.random.default_rng([config.seed, CLASSES_STREAM])
    while True:
        yield classes[int(np.searchsorted(bounds[:-1], rng.random() * bounds[-1], side="right"))]


def _fit(request: Planned, context_tokens: int) -> Planned:
    """Shortens the output first, then the prompt, to fit the context."""
    if request.prompt_tokens + request.output_tokens <= context_tokens:
        return request
    prompt = min(request.prompt_tokens, context_tokens - 1)
    output = min(request.output_tokens, context_tokens - prompt)
    return replace(request, prompt_tokens=prompt, output_tokens=output)


class PromptSource:
    """The token ids of planned requests: random ordinary tokens; equal blocks have equal tokens.

    Token `i` of block `b` is a hash of (seed, b, i), so that numpy makes all blocks of a prompt at once: a prompt of
    thousands of blocks must not hold the client up.
    """

    def __init__(self, seed: int, vocabulary: int) -> None:
        self._seed = seed
        self._low = min(FIRST_ORDINARY_TOKEN, vocabulary // 2)
        self._range = np.uint64(vocabulary - self._low)

    def ids(self, request: Planned) -> list[int]:
        """A function of the seed and of the request's index or blocks."""
        if not request.blocks:
            return self._draw(PROMPTS_STREAM, [request.index], request.prompt_tokens)
        needed = -(-request.prompt_tokens // request.block_tokens)
        return self._draw(BLOCKS_STREAM, request.blocks[:needed], request.block_tokens)[: request.prompt_tokens]

    def _draw(self, stream: int, blocks: Sequence[int], count: int) -> list[int]:
        """`count` tokens of each block, concatenated."""
        root = _mixed(np.array([self._seed * 8 + stream], dtype=np.uint64))
        keys = _mixed(root + np.array(blocks, dtype=np.uint64))
        numbers = _mixed(keys[:, None] + np.arange(count, dtype=np.uint64) * GOLDEN)
        ids: list[int] = (numbers % self._range + np.uint64(self._low)).ravel().tolist()
        return ids


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), which makes neighbours unrelated."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
