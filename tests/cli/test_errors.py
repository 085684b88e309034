"""Whatever goes wrong: one line, and a status that tells whose fault it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from baton.cli import main
from tests.cli.runner import Result, baton


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address where nobody listens, and nobody else can."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


async def test_help_lists_the_commands_and_imports_no_torch() -> None:
    result = await baton("--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.status == 0
    for command in ["up", "router", "prefill", "decode", "generate", "chat", "workers", "status", "model", "demo"]:
        assert f" {command} " in result.out
    assert " torch\n" not in result.err
    assert " cyclopts\n" in result.err


async def test_a_client_command_imports_no_torch(closed_port: str) -> None:
    result = await baton("generate", "hi", "--server", closed_port, PYTHONPROFILEIMPORTTIME="1")
    assert result.status == 1
    assert " torch\n" not in result.err
    assert " grpc\n" in result.err


@pytest.mark.parametrize("command", ["up", "decode", "generate", "model fetch"])
async def test_every_command_has_help(command: str) -> None:
    result = await baton(*command.split(), "--help")
    assert (result.status, result.err) == (0, "")
    assert f"baton {command}" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["generate"], "prompt"),
        (["generate", "hi", "--no-such-flag"], "--no-such-flag"),
        (["generate", "hi", "--top-k", "many"], "--top-k"),
        (["generate", "hi", "--top-k", "-1"], "sampling.top_k"),
        (["generate", "hi", "--when-unmet", "never"], "never"),
        (["generate", "--no-such-flag"], "--no-such-flag"),
        (["generate", ""], "prompt: is empty"),
        (["generate", "hi", "--raw", "--system", "be brief"], "system:"),
        (["generate", "hi", "--server", "nowhere"], "expected HOST:PORT"),
        (["workers", "--server", "127.0.0.1:99999"], "expected HOST:PORT"),
        (["health", "localhost"], "expected HOST:PORT"),
        (["up", "--prefill", "0"], "prefill: must be at least 1"),
        (["up", "--transport", "pigeon"], "pigeon"),
        (["up", "--pin", "--threads", "2"], "threads:"),
        (["up", "--model", "no-such-model"], "no-such-model"),
        (["prefill", "--pool-tokens", "0"], "pool_tokens: must be at least 1"),
        (["router", "--lease-s", "0"], "lease_s: must be positive"),
        (["router", "--lease-s", "nan"], "lease_s: must be a finite number, not nan"),
        (["up", "--start-s", "1e300"], "start_s: must be at most 604800, a week"),
        (["generate", "hi", "--timeout", "soon"], "--timeout"),
        *(
            ([*command, f"--timeout={value}"], f"timeout: must be positive, in seconds, not {value}")
            for command in (["generate", "hi"], ["chat"])
            for value in ("0", "-1", "nan", "-inf")
        ),
        *((["bench", f"--timeout-s={value}"], "timeout_s: must be positive") for value in ("0", "-1", "nan", "inf")),
    ],
)
def test_a_wrong_command_line_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(arguments)
    out, err = capsys.readouterr()
    assert message.lower() in Result(status, out, err).error_line.lower()
    assert (status, out) == (2, "")


@pytest.mark.parametrize("command", ["generate hi", "tokenize hi", "workers", "models", "status"])
async def test_no_server_is_status_1(command: str, closed_port: str) -> None:
    result = await baton(*command.split(), "--server", closed_port)
    assert (result.status, result.out) == (1, "")
    assert result.error_line == f"cannot reach {closed_port}: connection refused"


@pytest.mark.parametrize("timeout", ["1e10", "1e300", "inf", "0.5"])
def test_an_absurd_timeout_is_none(timeout: str, closed_port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--timeout", timeout, "--server", closed_port]) == 1
    assert f"cannot reach {closed_port}" in capsys.readouterr().err


async def test_the_server_may_come_from_the_environment(closed_port: str) -> None:
    result = await baton("models", BATON_SERVER=closed_port)
    assert closed_port in result.error_line


async def test_text_that_is_not_utf8_is_refused() -> None:
    as_argument = await baton("generate", b"caf\xe9", LC_ALL="C.UTF-8")
    assert (as_argument.status, as_argument.error_line) == (2, "prompt: is not valid UTF-8")
    as_input = await baton("generate", "-", stdin=b"caf\xe9 x")
    assert (as_input.status, as_input.error_line[:30]) == (2, "prompt: is not valid UTF-8: in")


async def test_an_occupied_port_is_one_line() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        result = await baton("router", "--listen", address, "--log-level", "error")
        assert (result.status, result.out) == (2, "")
        assert result.error_line == f"cannot listen on {address}: address already in use"
        whole = await baton("up", "--listen", address)
        assert (whole.status, whole.out) == (2, "")
        assert whole.error_line == f"router: cannot listen on {address}: address already in use"


async def test_a_stranger_is_no_parent() -> None:
    result = await baton("router", "--listen", "127.0.0.1:0", "--parent-pid", "1")
    assert (result.status, result.error_line) == (1, "the parent process 1 is gone")


async def test_debug_shows_the_traceback_too(closed_port: str) -> None:
    result = await baton("models", "--server", closed_port, BATON_DEBUG="1")
    assert result.status == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("baton: cannot reach")
