"""What pools and index save together on prompts with shared prefixes, and the references that this is held against."""

from __future__ import annotations

import json
from itertools import pairwise, permutations
from pathlib import Path

import pytest

from baton.model import BLOCK_TOKENS
from benchmarks.simulated import prefix
from benchmarks.simulated.prefix import Simulation, TracePrompt, clairvoyant, one_lru, read, synthesise


def prompts_of(*rows: list[int]) -> list[TracePrompt]:
    """Prompts of whole blocks and one more token."""
    return [TracePrompt(float(n), prefix._tokens([*ids, 999], 512 * len(ids) + 32)) for n, ids in enumerate(rows)]


def best_of_all(rows: list[list[int]], blocks: int) -> int:
    """By trying out, request by request, every set that could be kept: for small cases the very definition."""
    states = {frozenset[int](): 0}
    for ids in rows:
        after: dict[frozenset[int], int] = {}
        for kept, hits in states.items():
            run = next((n for n, block in enumerate(ids) if block not in kept), len(ids))
            for chosen in subsets(kept | set(ids), blocks):
                after[chosen] = max(after.get(chosen, 0), hits + run)
        states = after
    return max(states.values())


def subsets(blocks: frozenset[int], size: int) -> set[frozenset[int]]:
    return {frozenset(order[:size]) for order in permutations(sorted(blocks), min(size, len(blocks)))}


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]],
        [[1, 2, 3], [1, 4], [5], [1, 2, 3], [1, 4], [6], [1, 2]],
        [[1], [2], [3], [1], [2], [3], [1]],
        [[1, 2], [1, 3], [1, 4], [1, 2], [1, 3]],
    ],
)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_no_cache_saves_more_than_the_clairvoyant_one(rows: list[list[int]], blocks: int) -> None:
    best = clairvoyant(prompts_of(*rows), blocks)
    assert best == best_of_all(rows, blocks) * BLOCK_TOKENS
    assert one_lru(prompts_of(*rows), blocks) <= best


def test_one_lru_cache() -> None:
    rows = prompts_of([1, 2], [1, 2], [3], [1, 2])
    assert one_lru(rows, 3) == 4 * BLOCK_TOKENS
    assert one_lru(rows, 2) == 3 * BLOCK_TOKENS, "the end of the chain went first"


def test_one_worker_alone_is_that_cache() -> None:
    """With room for all, and no prompt whose last token ends a block: that one a worker computes at any rate."""
    lengths = [len(prompt.tokens) - (len(prompt.tokens) % BLOCK_TOKENS == 0) for prompt in synthesise(300)]
    prompts = [TracePrompt(10.0 * n, p.tokens[: lengths[n]]) for n, p in enumerate(synthesise(300))]
    simulation = Simulation(prompts, 1, 100_000, 1_000_000)
    simulation.run()
    assert simulation.saved == one_lru(prompts, 100_000) == clairvoyant(prompts, 100_000)


def test_a_trace_is_read_and_shrunk(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1300, "output_length": 6, "hash_ids": [0, 1, 2]},
        {"timestamp": 1500, "input_length": 1024, "output_length": 6, "hash_ids": [0, 1]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read(path)
    assert (first.at, second.at, len(first.tokens), len(second.tokens)) == (0.0, 1.5, 41, 32)
    assert first.tokens[:32] == second.tokens
    assert [len(first.whole_blocks), len(second.whole_blocks)] == [2, 2]


@pytest.mark.parametrize("workers", [1, 4])
def test_most_of_what_a_perfect_cache_saves_is_saved(workers: int) -> None:
    prompts = synthesise(800)
    simulation = Simulation(prompts, workers, 2048, 1_000_000)
    simulation.run()
    assert simulation.saved >= 0.8 * clairvoyant(prompts, workers * 2048)
    assert 0.95 < sum(simulation.foretold) / simulation.saved < 1.05, "the router knows what the pools have"


def test_a_small_index_saves_less_and_stays_right() -> None:
    prompts = synthesise(800)
    saved = []
    for entries in (0, 500, 1_000_000):
        simulation = Simulation(prompts, 4, 2048, entries)
        simulation.run()
        assert len(simulation.prefixes) <= entries
        saved.append(simulation.saved)
    assert all(less < more for less, more in pairwise(saved))
