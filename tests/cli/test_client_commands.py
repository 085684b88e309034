"""The commands that talk to a cluster, as processes, against a scripted server."""

from __future__ import annotations

import asyncio
import json
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from baton import errors
from tests.cli.runner import COMMAND, LIMIT_S, baton, environment
from tests.client.double import DEGRADED, Double, serving

TEXT = "The capital of France is Paris.\n"


@pytest_asyncio.fixture
async def double() -> AsyncIterator[Double]:
    async with serving(Double()) as running:
        yield running


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_generate_prints_the_answer_and_asks_as_a_chat(double: Double) -> None:
    result = await baton("generate", "hi", "--system", "be brief", "--server", double.address)
    assert (result.status, result.out, result.err) == (0, TEXT, "")
    (request,) = double.requests
    assert [(entry.role, entry.content) for entry in request.chat.messages] == [("system", "be brief"), ("user", "hi")]


async def test_generate_raw_sends_the_prompt_as_it_is(double: Double) -> None:
    result = await baton("generate", "-", "--raw", "--server", double.address, stdin="é\n".encode())
    assert result.status == 0
    assert double.requests[0].prompt == "é\n"
    assert not double.requests[0].HasField("chat")


async def test_generate_passes_its_flags_on(double: Double) -> None:
    flags = "--temperature 0 --top-k 3 --stop x --stop --y --stop-token-id 5 --ignore-eos --ttft-ms 90 --priority -2"
    result = await baton("generate", "hi", "--server", double.address, *flags.split())
    assert result.status == 2, "a value that looks like a flag is a mistake"
    flags = flags.replace("--stop --y", "--stop=--y")
    result = await baton("generate", "hi", "--server", double.address, *flags.split())
    assert (result.status, result.err) == (0, "")
    (request,) = double.requests
    assert (request.sampling.temperature, request.sampling.top_k) == (0, 3)
    assert request.sampling.HasField("temperature")
    assert (list(request.stopping.stop), list(request.stopping.stop_token_ids)) == (["x", "--y"], [5])
    assert request.stopping.ignore_eos
    assert (request.slo.ttft_ms, request.priority) == (90, -2)


async def test_generate_json_is_one_object_per_event(double: Double) -> None:
    result = await baton("generate", "hi", "--json", "--logprobs", "1", "--server", double.address)
    events = json_lines(result.out)
    assert [event["event"] for event in events] == ["accepted", "tokens", "tokens", "tokens", "finished"]
    assert events[0]["seed"] == 7
    assert "predicted_ttft_ms" not in events[0], "absent, not null"
    assert events[1] == {
        "event": "tokens",
        "position": 5,
        "ids": [100],
        "text": "The capital",
        "logprobs": [{"logprob": -0.5, "top": [[200, -1.5]]}],
    }
    assert events[-1]["reason"] == "eos"
    assert events[-1]["timeline"]["path"] == "disaggregated"
    assert events[-1]["slo"] == {"ttft_kept": True}


async def test_generate_shows_logprobs_and_the_timeline(double: Double) -> None:
    result = await baton("generate", "hi", "--logprobs", "2", "--timeline", "--server", double.address)
    lines = result.out.splitlines()
    assert lines[0] == TEXT.strip()
    assert lines[1].split() == ["5", "100", "-0.5000", "200:-1.500", "201:-2.500"]
    assert len(lines) == 4
    assert "prefill-0" in result.err
    assert "shm, 1 blocks" in result.err


async def test_a_failure_in_the_stream_keeps_what_came(double: Double) -> None:
    double.error, double.after = errors.Unavailable("decode-0 is gone", 2.0), 2
    result = await baton("generate", "hi", "--server", double.address)
    assert (result.status, result.out) == (1, "The capital of France\n")
    assert result.error_line == "decode-0 is gone"
    result = await baton("generate", "hi", "--json", "--server", double.address)
    assert result.status == 1
    assert json_lines(result.out)[-1] == {
        "event": "error",
        "code": "UNAVAILABLE",
        "message": "decode-0 is gone",
        "retry_after_s": 2.0,
    }


async def test_a_refusal_is_status_2_and_names_the_field(double: Double) -> None:
    double.error = errors.InvalidArgument("sampling.top_p", "must be in (0, 1]")
    result = await baton("generate", "hi", "--top-p", "2", "--server", double.address)
    assert (result.status, result.out) == (2, "")
    assert result.error_line == "sampling.top_p: must be in (0, 1]"


async def test_ctrl_c_cancels_the_request(double: Double) -> None:
    double.endless = True
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "generate", "hi", "--server", double.address, stdout=PIPE, stderr=PIPE, env=environment()
    )
    async with asyncio.timeout(LIMIT_S):
        await double.received.wait()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        await double.cancelled.wait()
    assert (process.returncode, err) == (130, b"")


async def test_a_reader_that_goes_away_is_no_error(double: Double) -> None:
    double.endless = True
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "generate", "hi", "--server", double.address, stdout=PIPE, stderr=PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(LIMIT_S):
        await process.stdout.read(1)
        process.stdout._transport.close()  # type: ignore[attr-defined]
        assert await process.stderr.read() == b""
        assert await process.wait() == 1


async def test_chat_remembers(double: Double) -> None:
    result = await baton("chat", "--server", double.address, stdin=b"one\n\ntwo\n")
    assert (result.status, result.out, result.err) == (0, TEXT * 2, "")
    assert [(entry.role, entry.content) for entry in double.requests[1].chat.messages] == [
        ("user", "one"),
        ("assistant", TEXT.strip()),
        ("user", "two"),
    ]


async def test_chat_json_and_an_error_ends_it(double: Double) -> None:
    result = await baton("chat", "--json", "--server", double.address, stdin=b"one\n\xff\nthree\n")
    assert result.status == 2
    assert [event["event"] for event in json_lines(result.out)] == [
        "accepted",
        "tokens",
        "tokens",
        "tokens",
        "finished",
    ]
    assert result.error_line == "message: is not valid UTF-8"


async def test_tokenize_prints_ids(double: Double) -> None:
    assert (await baton("tokenize", "hi", "--server", double.address)).out == "1 2 3\n"
    result = await baton("tokenize", "hi", "--raw", "--json", "--server", double.address)
    assert json.loads(result.out) == {"ids": [1, 2, 3], "text": "hi"}


async def test_the_operators_commands(double: Double) -> None:
    workers = await baton("workers", "--server", double.address)
    header, row, degraded = workers.out.splitlines()
    assert degraded == f"degraded: {DEGRADED}"
    assert header.split()[:4] == ["name", "roles", "model", "address"]
    assert row.split()[:5] == ["prefill-0", "prefill", "tiny", "127.0.0.1:10", "yes"]
    assert "3/128" in row
    found = json.loads((await baton("workers", "--json", "--server", double.address)).out)
    assert found["degraded"] == [DEGRADED]
    (worker,) = found["workers"]
    assert (worker["attached"], worker["load"]["running"], worker["transports"]) == (True, 2, ["shm", "tcp"])
    models = await baton("models", "--server", double.address)
    assert models.out.splitlines()[1].split() == ["tiny", "64", "1", "2", "f00"]
    status = await baton("status", double.address)
    assert "0 MB, 10 blocks: 7 free, 1 held, 1 cached, 1 quarantined" in status.out
    assert ["degraded", *DEGRADED.split()] in [line.split() for line in status.out.splitlines()]
    assert json.loads((await baton("status", double.address, "--json")).out)["live"] == {"requests": 2}


async def test_health_is_told_by_the_status(double: Double) -> None:
    well = await baton("health", double.address)
    assert (well.status, well.out) == (0, "serving\n")
    unknown = await baton("health", double.address, "--service", "nobody")
    assert (unknown.status, unknown.out) == (1, "service_unknown\n")


async def test_explain_shows_the_decision_and_its_candidates(double: Double) -> None:
    result = await baton("explain", "known", "--server", double.address)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "prompt: prefill-0 (prefill): soonest; promised ttft 120 ms"
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["worker", "way", "fits", "ttft"],
        ["prefill-0", "prefill", "yes", "120.0"],
        ["decode-0", "direct", "no", "-"],
    ]
    assert lines[4] == "and 2 others"
    (shown,) = json.loads((await baton("explain", "known", "--json", "--server", double.address)).out)
    assert (shown["step"], len(shown["candidates"])) == ("prompt", 2)
    unknown = await baton("explain", "nobody", "--server", double.address)
    assert (unknown.status, unknown.error_line) == (1, "no request 'nobody' is remembered here")
