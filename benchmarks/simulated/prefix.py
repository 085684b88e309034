"""The prefilling that the prefix index saves on a trace with shared prefixes, beside a perfect cache of the same size.

Pools, digests, events with their delay, the index and its look-up are real; time is simulated, and a prompt costs its
uncached tokens. A prompt goes to the worker that would compute it first, by the router's knowledge. Two references,
each one cache of the size of all pools together, get every prompt at once and in order:

- clairvoyant: evicts the block whose next use is furthest in the future (Belady). No cache of that size saves more.
- one LRU: evicts the least recently used block, without knowledge of the future, like a real cache.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
import timeit
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from baton.messages import CacheUpdate
from baton.model import BLOCK_TOKENS, KvLayout, ModelCard
from baton.spec import ProcessRef, Sampling, SequenceSpec
from baton.telemetry import Counts
from baton.worker.cache_events import INTERVAL_S, CacheFeed
from benchmarks.report import Row, publish, spread
from kvtransfer.blocks.admission import Admission, Room
from kvtransfer.blocks.pool import BlockPool, CacheChange
from kvtransfer.blocks.prefix import block_digests
from router.workers.link import WorkerLink
from router.workers.prefixes import Prefixes, digests_of
from router.workers.worker import Registration, Worker

TRACE_BLOCK = 512
TARGET = 0.8
UTILISATION = 0.7
"""Of the workers without any cache: prompts queue, so that the worker with the longest prefix may be busy."""
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")
ROUTER = ProcessRef("router", "router", "")
CARD = ModelCard("trace", "trace", 1 << 20, 1 << 32, (), "", "", LAYOUT)


@dataclass(frozen=True, slots=True)
class TracePrompt:
    """`at` is its arrival in seconds."""

    at: float
    tokens: tuple[int, ...]

    @property
    def whole_blocks(self) -> list[tuple[int, ...]]:
        """The complete blocks. The references save all of them; a worker always computes the last token."""
        whole = len(self.tokens) // BLOCK_TOKENS
        return [self.tokens[n * BLOCK_TOKENS : (n + 1) * BLOCK_TOKENS] for n in range(whole)]


def read(path: Path) -> list[TracePrompt]:
    """A Mooncake trace, each of its blocks of 512 tokens shrunk to one of ours."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [TracePrompt(row["timestamp"] / 1e3, _tokens(row["hash_ids"], row["input_length"])) for row in rows]


def synthesise(prompts: int = 4000, seed: int = 1) -> list[TracePrompt]:
    """A similar trace: a few shared beginnings, sessions that grow turn by turn, and single prompts."""
    draw = random.Random(seed)
    beginnings = [list(range(1000 * n, 1000 * n + draw.randint(2, 24))) for n in range(12)]
    sessions: list[list[int]] = []
    fresh, at, made = 100_000, 0.0, list[TracePrompt]()
    for _ in range(prompts):
        at += draw.expovariate(4.0)
        if sessions and draw.random() < 0.6:
            ids = sessions[-1 - min(int(draw.expovariate(0.01)), len(sessions) - 1)]
        else:
            ids = list(draw.choices(beginnings, [1 / (n + 1) for n in range(12)])[0])
            sessions.append(ids)
        more = min(1 + int(draw.expovariate(0.1)), 80)
        ids += range(fresh, fresh + more)
        fresh += more
        made.append(TracePrompt(at, _tokens(ids, len(ids) * TRACE_BLOCK - draw.randrange(TRACE_BLOCK))))
    return made


def _tokens(ids: Sequence[int], length: int) -> tuple[int, ...]:
    scaled = max(1, round(length * BLOCK_TOKENS / TRACE_BLOCK))
    return tuple(token for block in ids for token in range(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS))[:scaled]


class SimulatedWorker:
    """A prefill worker's pool and its event feed. Computes one prompt at a time."""

    def __init__(self, number: int, blocks: int) -> None:
        process = ProcessRef(f"prefill-{number}", f"prefill-{number}", "")
        link = WorkerLink(process, ROUTER, on_event=lambda _: None, on_state=lambda: None, on_lost=lambda _: None)
        self.known = Worker(Registration(process, frozenset({"prefill"}), CARD, blocks, 1, ()), link, 0.0)
        self.pool = BlockPool(blocks)
        self.admission = Admission(self.pool, LAYOUT, CARD.fingerprint)
        self.feed = CacheFeed(1, ())
        self.pool.listeners.append(self.changed)
        self.queue: list[SequenceSpec] = []
        self.queued = 0
        self.turn = -1
        self.busy_until = 0.0
        self.room: Room | None = None

    def changed(self, change: CacheChange, digest: bytes) -> None:
        self.feed.changed(change, digest)


class Simulation:
    """Places and computes the prompts; events reach the router with a real cluster's delay."""

    def __init__(self, prompts: Sequence[TracePrompt], workers: int, blocks: int, entries: int) -> None:
        self.workers = [SimulatedWorker(number, blocks) for number in range(workers)]
        self.prefixes = Prefixes(entries, Counts())
        for worker in self.workers:
            self.prefixes.on_joined(worker.known)
        tokens = sum(len(prompt.tokens) for prompt in prompts)
        self.rate = tokens / prompts[-1].at / workers / UTILISATION
        self.saved = 0
        self.foretold: list[int] = []
        self._steps = 0
        self._agenda: list[tuple[float, int, partial[None]]] = []
        for prompt in prompts:
            self._plan(prompt.at, partial(self._arrive, prompt))
        self.now = 0.0

    def run(self) -> None:
        while self._agenda:
            self.now, _, step = heapq.heappop(self._agenda)
            step()
        for worker in self.workers:
            worker.pool.check_integrity()

    def _plan(self, at: float, step: partial[None]) -> None:
        self._steps += 1
        heapq.heappush(self._agenda, (at, self._steps, step))

    def _arrive(self, prompt: TracePrompt) -> None:
        spec = SequenceSpec(
            attempt=bytes(16), request_id="", prompt=prompt.tokens, sampling=Sampling(), max_tokens=1, router=ROUTER
        )
        cached = self.prefixes.cached_tokens(CARD, len(prompt.tokens), digests_of(CARD, prompt.tokens, ""))

        def done_at(worker: SimulatedWorker) -> tuple[float, int]:
            wait = max(0.0, worker.busy_until - self.now) + worker.queued / self.rate
            return wait + (len(prompt.tokens) - cached.get(worker.known, 0)) / self.rate, worker.turn

        worker = min(self.workers, key=done_at)
        worker.turn = len(self.foretold)
        self.foretold.append(cached.get(worker.known, 0))
        worker.queue.append(spec)
        worker.queued += len(prompt.tokens) - cached.get(worker.known, 0)
        if worker.room is None:
            self._start(worker)

    def _start(self, worker: SimulatedWorker) -> None:
        spec = worker.queue.pop(0)
        digests = worker.admission.digests(spec)
        room = worker.room = worker.admission.reserve(spec, digests, spec.known_tokens)
        assert room is not None, "one prompt at a time fits"
        self.saved += room.cached_tokens
        uncached = len(spec.prompt) - room.cached_tokens
        worker.queued = max(0, worker.queued - uncached) if worker.queue else 0
        worker.busy_until = self.now + uncached / self.rate
        self._plan(worker.busy_until, partial(self._finish, worker, digests))

    def _finish(self, worker: SimulatedWorker, digests: list[bytes]) -> None:
        assert worker.room is not None, "it computes"
        worker.admission.remember(list(worker.room.blocks), digests)
        worker.pool.release(worker.room.blocks)
        worker.room = None
        self._plan(self.now + INTERVAL_S, partial(self._tell, worker))
        if worker.queue:
            self._start(worker)

    def _tell(self, worker: SimulatedWorker) -> None:
        while worker.feed.due:
            self.prefixes.on_update(worker.known, worker.feed.take())


def clairvoyant(prompts: Sequence[TracePrompt], blocks: int) -> int:
    """Tokens that the best possible cache of `blocks` blocks saves (Belady's rule). A block's next use is never later
    than that of later blocks of its chain, so that it keeps whole prefixes."""
    chains = list(_chains(prompts))
    uses = [block for chain in chains for block in chain]
    following, last = [sys.maxsize] * len(uses), dict[int, int]()
    for position in range(len(uses) - 1, -1, -1):
        following[position] = last.get(uses[position], sys.maxsize)
        last[uses[position]] = position
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    hits = 0
    for position, block in enumerate(uses):
        hits += block in kept
        kept[block] = following[position]
        heapq.heappush(furthest, (-following[position], block))
        while len(kept) > blocks:
            use, victim = heapq.heappop(furthest)
            if kept.get(victim) == -use:
                del kept[victim]
    return hits * BLOCK_TOKENS


def one_lru(prompts: Sequence[TracePrompt], blocks: int) -> int:
    """Tokens that one least-recently-used cache of `blocks` blocks saves; it evicts a chain from its end."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for chain in _chains(prompts):
        run = next((n for n, block in enumerate(chain) if block not in kept), len(chain))
        hits += run
        for block in reversed(chain):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > blocks:
            kept.popitem(last=False)
    return hits * BLOCK_TOKENS


def _chains(prompts: Sequence[TracePrompt]) -> Iterator[list[int]]:
    """Numbers of each prompt's whole blocks, equal for equal prefixes."""
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    for prompt in prompts:
        chain, parent = list[int](), -1
        for block in prompt.whole_blocks:
            parent = numbers.setdefault((parent, block), len(numbers))
            chain.append(parent)
        yield chain


def compare(prompts: Sequence[TracePrompt], workers: int, blocks: int, entries: int) -> list[Row]:
    """For one size: the saved tokens beside both references, and the share that the router foretold."""
    simulation = Simulation(prompts, workers, blocks, entries)
    simulation.run()
    percent = 100 / sum(len(prompt.tokens) for prompt in prompts)
    case, ours, rows = f"{workers} x {blocks} blocks", simulation.saved * percent, []
    for peer, best in (("one LRU cache", one_lru), ("clairvoyant cache", clairvoyant)):
        theirs = best(prompts, workers * blocks) * percent
        target = f">= {TARGET * theirs:.1f}"
        rows.append(Row(case, "% of prefill saved", ours, peer, theirs, True, target, ours >= TARGET * theirs))
    foretold = sum(simulation.foretold) * percent
    return [*rows, Row(case, "% of prefill foretold", foretold, "what was saved", ours, True)]


def look_up_cost(workers: int = 64, blocks: int = 10_000) -> list[Row]:
    """The time of a look-up with its digests, of a prompt of 1,024 tokens cached everywhere or nowhere."""
    prefixes, cached, draw = Prefixes(workers * blocks, Counts()), tuple(range(1024)), random.Random(1)
    for number in range(workers):
        worker = SimulatedWorker(number, blocks).known
        prefixes.on_joined(worker)
        others = [draw.randbytes(16) for _ in range(blocks - 64)]
        inserted = [*others, *block_digests(cached, fingerprint="trace")]
        prefixes.on_update(worker, CacheUpdate(1, 1, inserted, ()))
    rows = []
    for case, prompt in (("1,024 cached tokens", (*cached, 1)), ("nothing cached", (*cached[1:], 1, 1))):

        def look_up(prompt: tuple[int, ...] = prompt) -> None:
            prefixes.cached_tokens(CARD, len(prompt), digests_of(CARD, prompt, ""))

        times = [1e6 * seconds for seconds in timeit.repeat(look_up, number=1, repeat=300)]
        ours = statistics.median(times)
        case = f"look up {case}, {workers} x {blocks} blocks"
        rows.append(Row(case, "µs", ours, "", None, False, "<= 100", ours <= 100, spread(times)))
    return rows


def main() -> None:
    """Exits with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a Mooncake trace (JSONL); without one, a synthetic stand-in")
    parser.add_argument("--blocks", type=int, default=2048, help="of each pool; the default is a worker's")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--entries", type=int, default=1_000_000, help="the index's --prefix-index-blocks")
    given = parser.parse_args()
    prompts = read(given.trace) if given.trace else synthesise()
    mean = statistics.mean(len(prompt.tokens) for prompt in prompts)
    distinct = len({block for chain in _chains(prompts) for block in chain})
    print(f"{len(prompts)} prompts of {mean:.0f} tokens on average, {distinct} distinct blocks")
    rows = [row for workers in given.workers for row in compare(prompts, workers, given.blocks, given.entries)]
    sys.exit(not publish("prefix", [*rows, *look_up_cost()]))


if __name__ == "__main__":
    main()
