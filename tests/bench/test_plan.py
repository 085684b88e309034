"""Plans: traces in their recorders' formats, lengths, classes, and what is wrong with a bad setting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from baton.bench.schedule.lengths import Fixed, Lognormal, Uniform, parse_lengths
from baton.bench.schedule.plan import LoadPlan, Planned, PromptSource, make_plan
from baton.bench.schedule.traces import read_trace, scaled
from baton.errors import ConfigError
from tests.bench.builders import config

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,400,44\r
2023-11-16 18:15:48.6805900,800,109\r
2023-11-16 18:15:50.6805900,1600,0"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1300, "output_length": 16, "hash_ids": [7, 8, 9]},
    {"timestamp": 2000, "input_length": 1536, "output_length": 32, "hash_ids": [7, 8, 10]},
    {"timestamp": 5000, "input_length": 512, "output_length": 64, "hash_ids": [11]},
]


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "conv.csv"
    path.write_text(AZURE, newline="")
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MOONCAKE) + "\n")
    return path


def sent(plan: LoadPlan) -> list[tuple[float, int, int]]:
    return [(round(entry.at_s, 6), entry.prompt_tokens, entry.output_tokens) for entry in plan.requests]


def test_azure_is_replayed_with_its_times_and_lengths(azure: Path) -> None:
    plan = make_plan(config(trace=azure), 8192)
    assert sent(plan) == [(0.0, 400, 44), (2.0, 800, 109), (4.0, 1600, 1)]
    assert plan.end_s == 6.0, "the trace is over before the time is, and its last request has its share of it"


def test_requests_that_all_come_at_once_have_the_time_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "at_once.jsonl"
    rows = [MOONCAKE[0] | {"timestamp": at_ms} for at_ms in (0, 0, 0, 3000)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert make_plan(config(trace=path, requests=2, seconds=9.0), 8192).window_s == 9.0
    assert make_plan(config(trace=path, requests=3, seconds=9.0), 8192).window_s == 3.0, "when the next is due"
    assert make_plan(config(trace=path, seconds=9.0), 8192).window_s == 4.0


def test_lengths_and_times_scale(azure: Path) -> None:
    plan = make_plan(config(trace=azure, length_scale=0.125, time_scale=0.5), 8192)
    assert sent(plan) == [(0.0, 50, 6), (1.0, 100, 14), (2.0, 200, 1)]


def test_a_rate_overrides_the_traces_own(azure: Path) -> None:
    assert [at_s for at_s, *_ in sent(make_plan(config(trace=azure, rate=5.0), 8192))] == [0.0, 0.2, 0.4]


def test_a_traces_lengths_go_with_other_arrivals(azure: Path) -> None:
    plan = make_plan(config(trace=azure, arrivals="steady", burstiness=0.0, rate=1.0, seconds=5.5), 8192)
    assert sent(plan) == [(1.0, 400, 44), (2.0, 800, 109), (3.0, 1600, 1), (4.0, 400, 44), (5.0, 800, 109)]
    assert plan.end_s == 5.5


def test_mooncakes_shared_blocks_are_shared_and_stay_so_when_scaled(mooncake: Path) -> None:
    plan = make_plan(config(trace=mooncake, length_scale=1 / 16), 8192)
    assert sent(plan) == [(0.0, 81, 1), (1.0, 96, 2), (4.0, 32, 4)]
    prompts = PromptSource(seed=3, vocabulary=1000)
    first, second, third = (prompts.ids(entry) for entry in plan.requests)
    assert [len(first), len(second), len(third)] == [81, 96, 32]
    assert first[:64] == second[:64]
    assert first[64:] != second[64:81]
    assert third != first[:32]
    assert first == PromptSource(seed=3, vocabulary=1000).ids(plan.requests[0])
    assert first != PromptSource(seed=4, vocabulary=1000).ids(plan.requests[0])


def test_a_scale_that_does_not_divide_the_block_keeps_prompts_within_their_blocks(mooncake: Path) -> None:
    for entry in read_trace(mooncake, "auto"):
        for factor in (0.3, 0.0123, 1e-6, 1.7):
            small = scaled(entry, factor)
            assert 1 <= small.prompt_tokens <= len(small.blocks) * small.block_tokens


def test_prompts_without_blocks_are_ordinary_tokens_and_all_differ() -> None:
    prompts = PromptSource(seed=1, vocabulary=1000)
    found = [prompts.ids(Planned(index, 0.0, 50, 1)) for index in range(20)]
    assert len({tuple(ids) for ids in found}) == 20
    assert all(256 <= token < 1000 for ids in found for token in ids)


def test_what_does_not_fit_the_context_is_cut_and_counted(azure: Path) -> None:
    plan = make_plan(config(trace=azure), 850)
    assert sent(plan) == [(0.0, 400, 44), (2.0, 800, 50), (4.0, 849, 1)]
    assert plan.clipped == 2


def test_classes_get_their_share_and_their_objectives() -> None:
    flags = ["chat:3:ttft_ms=200,priority=5", "bulk:1:tpot_ms=9,when_unmet=refuse"]
    plan = make_plan(config(rate=1000.0, seconds=4.0, slo="ttft_ms=900", classes=flags), 8192)
    shares = Counter(entry.traffic.name for entry in plan.requests)
    assert shares["chat"] / len(plan.requests) == pytest.approx(0.75, abs=0.05)
    kinds = {entry.traffic.name: entry.traffic.options() for entry in plan.requests}
    assert kinds["chat"] == {"ttft_ms": 200, "priority": 5}
    assert kinds["bulk"] == {"ttft_ms": 900, "tpot_ms": 9, "when_unmet": "refuse"}


def test_the_rate_changes_nothing_but_the_times() -> None:
    slow, fast = (
        make_plan(config(rate=rate, requests=40, seconds=1e6, prompt_tokens="lognormal:95:1:900"), 8192)
        for rate in (1.0, 10.0)
    )
    assert [entry.prompt_tokens for entry in slow.requests] == [entry.prompt_tokens for entry in fast.requests]
    assert slow.end_s == pytest.approx(10 * fast.end_s)


def test_a_limit_on_requests_ends_the_window_where_the_next_was_due() -> None:
    plan = make_plan(config(rate=2.0, burstiness=0.0, requests=4), 8192)
    assert [entry.at_s for entry in plan.requests] == [0.5, 1.0, 1.5, 2.0]
    assert plan.end_s == 2.5


def test_lengths_are_what_they_are_called() -> None:
    assert parse_lengths("7", "x") == Fixed(7)
    assert parse_lengths("uniform:2:9", "x") == Uniform(2, 9)
    assert parse_lengths("lognormal:95:0.985:1756", "x") == Lognormal(95, 0.985, 1756)
    plan = make_plan(config(rate=2000.0, seconds=5.0, prompt_tokens="lognormal:95:0.985:1756"), 8192)
    lengths = sorted(entry.prompt_tokens for entry in plan.requests)
    assert lengths[len(lengths) // 2] == pytest.approx(95, rel=0.08)
    assert lengths[int(len(lengths) * 0.9)] == pytest.approx(336, rel=0.12)
    assert lengths[0] >= 1
    assert lengths[-1] <= 1756


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"seconds": -1.0}, "seconds"),
        ({"warmup_s": 30.0}, "warmup_s"),
        ({"burstiness": -0.1}, "burstiness"),
        ({"requests": 0}, "requests"),
        ({"channels": 0}, "channels"),
        ({"prompt_tokens": "0"}, "prompt_tokens"),
        ({"prompt_tokens": "uniform:5:4"}, "prompt_tokens"),
        ({"prompt_tokens": "lognormal:inf:1"}, "prompt_tokens"),
        ({"output_tokens": "lognormal:1"}, "output_tokens"),
        ({"arrivals": "trace"}, "trace"),
        ({"arrivals": "steps"}, "steps"),
        ({"steps": "1:2"}, "steps"),
        ({"arrivals": "steps", "steps": "1:x"}, "steps"),
        ({"arrivals": "steps", "steps": "1:2", "rate": 3.0}, "rate"),
        ({"slo": "ttft=3"}, "slo"),
        ({"slo": "ttft_ms=fast"}, "slo.ttft_ms"),
        ({"classes": ["chat"]}, "class"),
        ({"classes": ["chat:0"]}, "class"),
        ({"classes": ["a:1", "a:2"]}, "class"),
        ({"classes": ["a:1:priority=101"]}, "class.priority"),
        ({"classes": ["a:1:when_unmet=never"]}, "class.when_unmet"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        config(**settings)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("a.csv", AZURE.replace("800", "many"), ":3: ContextTokens: not 'many'"),
        ("a.csv", AZURE.replace("2023-11-16 18:15:48", "yesterday"), ":3: TIMESTAMP"),
        ("a.csv", AZURE.split("\r\n")[0], "holds no request"),
        ("a.csv", AZURE.replace("800", '"' + 200_000 * "8"), ":2: not CSV"),
        ("a.jsonl", "{", ":1: not JSON"),
        ("a.jsonl", "3", ":1: expected an object"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 4, "output_length": 1}', ":1: no hash_ids"),
        ("a.jsonl", json.dumps(MOONCAKE[0] | {"hash_ids": [1]}), ":1: hash_ids: 1 blocks are too few for 1300"),
        ("a.jsonl", json.dumps(MOONCAKE[0] | {"output_length": -1}), ":1: output_length: not -1"),
        ("a.jsonl", json.dumps(MOONCAKE[0] | {"input_length": float("inf")}), ":1: input_length: not inf"),
        ("a.jsonl", json.dumps(MOONCAKE[0] | {"timestamp": float("nan")}), ":1: timestamp: not nan"),
        ("a.txt", "", "trace_format"),
        ("absent.csv", None, "can't read"),
    ],
)
def test_a_bad_trace_is_told_by_line_and_field(tmp_path: Path, name: str, content: str | None, told: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, newline="")
    with pytest.raises(ConfigError, match=r"^trace") as caught:
        read_trace(path, "auto")
    assert told in str(caught.value)


def test_what_spreadsheets_and_other_writers_make_of_times_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    zoned = AZURE.replace("15:46.6805900", "15:46.68+00:00").replace("15:48.6805900", "16:48.68+00:01")
    path.write_text("\ufeff" + zoned, encoding="utf-8", newline="")
    assert [round(entry.at_s, 2) for entry in read_trace(path, "auto")] == [0.0, 2.0, 4.0]


def test_a_plan_that_would_send_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="seconds: no request is due"):
        make_plan(config(rate=0.001, seconds=1.0), 8192)
