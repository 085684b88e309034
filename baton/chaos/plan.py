"""What a chaos run will do: its requests and its events, drawn from a seed and nothing else.

The same seed and settings make the same plan. When the cluster answers is not part of it: two runs of a plan meet their
events in different states, so a fault that one run shows another may miss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from baton.chaos.config import ChaosConfig, Scale
from baton.client import RequestOptions
from baton.config import RoleName

LEAST_EVENTS = 10
"""Of each kind, in any run."""
DECODE_SHARE = 0.7
"""Of events that hit a worker: streams spend most of their time on decode workers."""
GREEDY_SHARE, STOPPED_SHARE, PRIORITY_SHARE = 0.25, 0.3, 0.25


@dataclass(frozen=True, slots=True)
class Script:
    """A request of the plan; `options` are those of `Client.generate`, but for the request's label."""

    label: str
    options: RequestOptions

    @property
    def first_position(self) -> int:
        """Of its output."""
        return len(self.options["token_ids"])


@dataclass(frozen=True, slots=True)
class Strike:
    """A planned event. Its kind makes of the last three what it needs; `pick` and `size` are in [0, 1)."""

    at_s: float
    """Seconds from the beginning of the harm; it happens later where the cluster can't bear it yet."""
    kind: str
    role: RoleName
    pick: float
    """Which of the candidates."""
    size: float


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """`scripts` are sent in turn, again and again, `at_once` at a time, until all `strikes` are over."""

    seed: int
    seconds: float
    at_once: int
    stream_s: float
    scripts: tuple[Script, ...]
    strikes: tuple[Strike, ...]


def make_plan(config: ChaosConfig, kinds: Sequence[str]) -> ChaosPlan:
    """`kinds` of events, each as often as the others. Pure."""
    scale, seconds = config.scale, config.minutes * 60
    requests = max(scale.fewest_requests, round(scale.requests_a_minute * config.minutes))
    draw = random.Random(f"requests/{config.seed}")
    prefixes = [_ids(draw, scale, length) for length in scale.prefixes]
    scripts = tuple(_script(draw, scale, prefixes, index) for index in range(requests))
    times = max(LEAST_EVENTS, round(seconds / scale.every_s))
    strikes = [strike for kind in kinds for strike in _strikes(config.seed, kind, times, seconds)]
    return ChaosPlan(
        seed=config.seed,
        seconds=seconds,
        at_once=scale.at_once,
        stream_s=scale.stream_s,
        scripts=scripts,
        strikes=tuple(sorted(strikes, key=lambda strike: strike.at_s)),
    )


def _strikes(seed: int, kind: str, times: int, seconds: float) -> list[Strike]:
    """One at a random moment of each of as many equal parts. Each kind has its own dice, so that a new one does not
    change what the others do."""
    draw = random.Random(f"{kind}/{seed}")
    found = []
    for index in range(times):
        role: RoleName = "decode" if draw.random() < DECODE_SHARE else "prefill"
        at_s = (index + draw.random()) / times * seconds
        found.append(Strike(at_s, kind, role, draw.random(), draw.random()))
    return found


def _ids(draw: random.Random, scale: Scale, length: int) -> list[int]:
    return [draw.randrange(scale.vocabulary) for _ in range(length)]


def _script(draw: random.Random, scale: Scale, prefixes: list[list[int]], index: int) -> Script:
    prompt = [*draw.choice(prefixes), *_ids(draw, scale, draw.randint(*scale.prompt))]
    options = RequestOptions(
        token_ids=prompt, max_tokens=draw.randint(*scale.output), seed=draw.randrange(2**32), ignore_eos=True
    )
    if draw.random() < GREEDY_SHARE:
        options["temperature"] = 0.0
    else:
        options["temperature"] = round(draw.uniform(0.6, 1.2), 2)
        options["top_k"] = draw.choice([0, 20, 50])
        options["top_p"] = draw.choice([1.0, 0.9])
    options["repetition_penalty"] = draw.choice([1.0, 1.1, 1.3])
    options["frequency_penalty"] = draw.choice([0.0, 0.3])
    options["presence_penalty"] = draw.choice([0.0, 0.5])
    if (logprobs := draw.choice([None, 0, 2])) is not None:
        options["logprobs"] = logprobs
    if draw.random() < STOPPED_SHARE:
        options["stop"] = [draw.choice(scale.stops)]
    if draw.random() < PRIORITY_SHARE:
        options["priority"] = draw.choice([-10, 10])
    return Script(f"r{index}", options)
