"""The simulated engine: its cost, its tokens, its KV, and that it is not taken for a model."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from baton.config import WorkerConfig
from baton.cost import CostModel, StepCost
from baton.engine.api import Sequence, Work
from baton.engine.simulated import COSTS, SimulatedEngine, bytes_card, faster, read_costs, simulated_card, typical_steps
from baton.errors import ConfigError
from baton.model import DTYPE_BYTES, KvLayout
from baton.spec import Sampling
from kvtransfer.blocks.memory import PoolMemory

FREE = StepCost()
COST = StepCost(3e-3, 9e-4, 2e-7, 5e-3, 5e-4, 1e-6)


def sequence(
    tokens: int = 40, seed: int = 7, computed: int = 0, tokens_now: list[int] | None = None, **changes: object
) -> Sequence:
    """`tokens_now` are the known ones where output has come after the prompt of so many `tokens`."""
    known = tokens_now or [(seed * 31 + place) % 256 for place in range(tokens)]
    made = Sequence(bytes(16), known, tokens, list(range(8)), computed, Sampling(seed=seed))
    return replace(made, **changes)  # type: ignore[arg-type]


def engine(memory: PoolMemory, **options: object) -> SimulatedEngine:
    card = replace(bytes_card(), kv_layout=memory.layout)
    return SimulatedEngine(card, memory.buffer, **{"costs": FREE, **options})  # type: ignore[arg-type]


@pytest.fixture(params=sorted(DTYPE_BYTES))
def memory(request: pytest.FixtureRequest) -> PoolMemory:
    return PoolMemory(KvLayout(layers=2, kv_heads=3, head_dim=4, dtype=request.param), 16, shared=False)


def generated(made: SimulatedEngine, given: Sequence, count: int) -> list[int]:
    for _ in range(count):
        sampled = made.step([Work(given, given.remaining)])[0]
        assert sampled is not None
        given.tokens += sampled.token_ids
    return given.tokens[-count:]


def test_a_worker_says_what_its_steps_cost_before_the_first() -> None:
    learned = CostModel(typical_steps(COST))
    for shape, seconds in typical_steps(COST):
        assert learned.cost.seconds(shape) == pytest.approx(seconds, rel=0.05)


def test_a_faster_machine_takes_a_share_of_the_time() -> None:
    for (shape, seconds), (_, less) in zip(typical_steps(COST), typical_steps(faster(COST, 4)), strict=True):
        assert less == pytest.approx(seconds / 4), shape


def test_a_step_takes_its_cost_without_computing() -> None:
    memory = PoolMemory(bytes_card().kv_layout, 16, shared=False)
    made = engine(memory, costs=StepCost(chunk=0.08))
    started, cpu = time.monotonic(), time.thread_time()
    made.step([Work(sequence(), 40)])
    assert time.monotonic() - started >= 0.08
    assert time.thread_time() - cpu < 0.04, "it waits, and does not spin"


def test_tokens_depend_on_seed_and_position_alone(memory: PoolMemory) -> None:
    whole = generated(engine(memory), sequence(), 12)
    made, chunked = engine(memory), sequence()
    assert made.step([Work(chunked, 15)]) == [None]
    assert generated(made, chunked, 12) == whole
    assert generated(engine(memory), sequence(seed=8), 12) != whole
    assert len(set(whole)) > 6


def test_it_ends_by_itself_only_when_asked(memory: PoolMemory) -> None:
    (eos,) = bytes_card().eos_token_ids
    long = [token for seed in range(40) for token in generated(engine(memory), sequence(seed=seed), 60)]
    assert eos not in long
    assert max(long) == eos - 1, "all others are drawn"
    assert generated(engine(memory, eos_after=5), sequence(), 5)[4] == eos


def test_log_probabilities_come_where_they_are_asked_for(memory: PoolMemory) -> None:
    given = sequence(sampling=Sampling(seed=1, logprobs=3))
    sampled = engine(memory).step([Work(given, 40)])[0]
    assert sampled is not None
    assert len(sampled.logprobs[0].top) == 3


def test_it_reads_what_another_one_wrote(memory: PoolMemory) -> None:
    given = sequence()
    first = generated(engine(memory), given, 1)
    moved = sequence(computed=40, tokens_now=[*given.tokens])
    assert generated(engine(memory), moved, 3) == generated(engine(memory), sequence(), 4)[1:]
    assert given.tokens[-1:] == first


@pytest.mark.parametrize("block", [0, 2])
def test_kv_of_another_sequence_is_noticed(memory: PoolMemory, block: int) -> None:
    given = sequence()
    generated(engine(memory), given, 1)
    memory.block(block)[-memory.layout.share_bytes] ^= 1
    moved = sequence(computed=40, tokens_now=[*given.tokens])
    with pytest.raises(AssertionError, match=f"the KV of position {block * 16} is not this sequence's"):
        engine(memory).step([Work(moved, 1)])


def test_costs_come_from_a_name_or_a_file(tmp_path: Path) -> None:
    assert read_costs("instant") is COSTS["instant"]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(asdict(COST)))
    assert read_costs(str(path)) == COST


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "chunk is missing"),
        ("[]", "expected an object of chunk, per_token"),
        (json.dumps(asdict(COST) | {"per_token": -1}), "per_token must be 0 or more"),
        (json.dumps(asdict(COST) | {"step": "much"}), "could not convert"),
        ("no json", "cost_model"),
    ],
)
def test_bad_costs_name_the_field(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_costs(str(path))
    with pytest.raises(ConfigError, match="neither smollm2-135m nor instant nor a file: no such file"):
        read_costs(str(tmp_path / "nothing"))


def config(**changes: object) -> WorkerConfig:
    return WorkerConfig(roles=frozenset({"decode"}), engine="simulated", **changes)  # type: ignore[arg-type]


def test_a_simulated_card_is_taken_for_no_models() -> None:
    made, shrunk = (
        simulated_card(config(model="bytes")),
        simulated_card(config(model="bytes", sim_kv_bytes_per_token=32)),
    )
    assert made.simulated
    assert made.name == "simulated/bytes"
    assert shrunk.kv_layout.token_bytes == 32
    prints = [bytes_card().fingerprint, made.fingerprint, shrunk.fingerprint]
    assert all(one != other for one, other in itertools.combinations(prints, 2))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sim_speed": 0.0}, "sim_speed"),
        ({"sim_kv_bytes_per_token": 6}, "sim_kv_bytes_per_token"),
        ({"sim_eos_after": -1}, "sim_eos_after"),
        ({"engine": "imaginary"}, "engine"),
        ({"engine": "model", "sim_speed": 2.0}, "sim_speed: for the simulated engine only"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        WorkerConfig(**{"roles": frozenset({"decode"}), "engine": "simulated"} | changes)  # type: ignore[arg-type]
