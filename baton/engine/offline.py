"""Running prompts to their end in this one process, without routers, workers or handoffs.

The baseline that benchmarks and tests compare the served system with: the same engine and step, first come first
served, chunked prefill, continuous batching.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from baton.engine.api import Engine, Sampled, Sequence, Work
from baton.errors import InvalidArgument, ResourceExhausted
from baton.spec import Sampling, TokenLogprobs

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue and until when: `max_tokens`, or one of `stop_token_ids` (EOS among them), which is kept."""

    tokens: tuple[int, ...]
    sampling: Sampling = GREEDY
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InvalidArgument("tokens", "a prompt has at least one token")
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", f"must be at least 1, not {self.max_tokens}")

    @property
    def kv_tokens(self) -> int:
        """Positions whose KV is needed: the last token drawn is never fed back."""
        return len(self.tokens) + self.max_tokens - 1


@dataclass(slots=True)
class GenerationResult:
    """What came of one prompt. `prefill_s` are the seconds of steps that computed its prompt (the last drew the first
    token), `step_s` those of each later step, one a token; a step's time is the whole batch's.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stopped: bool = False
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Running:
    prompt: Prompt
    sequence: Sequence
    completion: GenerationResult

    @property
    def in_prefill(self) -> bool:
        return not self.completion.tokens

    @property
    def is_done(self) -> bool:
        return self.completion.stopped or len(self.completion.tokens) == self.prompt.max_tokens

    def take(self, sampled: Sampled | None, seconds: float) -> None:
        """Accounts for a step and appends what it drew."""
        if self.in_prefill:
            self.completion.prefill_s += seconds
        else:
            self.completion.step_s.append(seconds)
        if sampled is None:
            return
        for token in sampled.token_ids:
            self.sequence.tokens.append(token)
            self.completion.tokens.append(token)
            self.completion.stopped = token in self.prompt.stop_token_ids
            if self.is_done:
                break
        self.completion.logprobs.extend(sampled.logprobs[: len(sampled.token_ids)])


class _Blocks:
    """The pool's free blocks. Blocks are given out in order of id and come back when a sequence ends."""

    def __init__(self, engine: Engine, count: int) -> None:
        self._layout = engine.layout
        self._free = deque(range(count))
        self._count = count

    def take(self, tokens: int) -> list[int] | None:
        """Blocks for `tokens` tokens, None where too few are free; ResourceExhausted where they never suffice."""
        need = self._layout.blocks_for(tokens)
        if need > self._count:
            raise ResourceExhausted(f"a prompt needs {need} blocks, the pool has {self._count}", None, "blocks")
        return None if need > len(self._free) else [self._free.popleft() for _ in range(need)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(blocks)


def generate(
    engine: Engine, prompts: Seq[Prompt], *, blocks: int, chunk_tokens: int = 512, max_sequences: int = 16
) -> list[GenerationResult]:
    """Runs all prompts, in batches of at most `max_sequences`, over pool blocks [0, blocks).

    A step computes one token of every sequence that decodes and at most `chunk_tokens` prompt tokens. Raises
    ResourceExhausted when a prompt with its output exceeds the whole pool.
    """
    pool = _Blocks(engine, blocks)
    waiting = deque((prompt, GenerationResult()) for prompt in prompts)
    completions = [completion for _, completion in waiting]
    running: list[_Running] = []
    while waiting or running:
        _admit(waiting, running, pool, max_sequences)
        chosen = _choose(running, chunk_tokens)
        started = time.perf_counter()
        sampled = engine.step([work for _, work in chosen])
        seconds = time.perf_counter() - started
        for (entry, _), result in zip(chosen, sampled, strict=True):
            entry.take(result, seconds)
        _retire(running, pool)
    return completions


def _admit(
    waiting: deque[tuple[Prompt, GenerationResult]], running: list[_Running], pool: _Blocks, max_sequences: int
) -> None:
    while waiting and len(running) < max_sequences:
        prompt, completion = waiting[0]
        held = pool.take(prompt.kv_tokens)
        if held is None:
            return
        waiting.popleft()
        key = len(running).to_bytes(16, "little")
        sequence = Sequence(key, list(prompt.tokens), len(prompt.tokens), held, 0, prompt.sampling)
        running.append(_Running(prompt, sequence, completion))


def _choose(running: list[_Running], chunk_tokens: int) -> list[tuple[_Running, Work]]:
    """One token of each that decodes; prompts share what a chunk holds, first come first served."""
    chosen, room = [], chunk_tokens
    for entry in running:
        count = 1 if not entry.in_prefill else min(entry.sequence.remaining, room)
        if count < 1:
            continue
        room -= count if entry.in_prefill else 0
        chosen.append((entry, Work(entry.sequence, count)))
    return chosen


def _retire(running: list[_Running], pool: _Blocks) -> None:
    for entry in [entry for entry in running if entry.is_done]:
        pool.give_back(entry.sequence.blocks)
        running.remove(entry)
