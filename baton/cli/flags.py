"""Flags that several commands share, as dataclasses; the attribute docstrings are the help texts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, TypeVar, cast

import uvloop
from cyclopts import Parameter

from baton.cli.exits import DEBUG
from baton.client.types import OnDisconnect, RequestOptions, WhenUnmet
from baton.config import DEFAULT_LISTEN
from baton.launch.cluster import LogFormat, LogLevel
from baton.launch.lifetime import die_with_parent, leave_terminal
from baton.telemetry import configure_logs

T = TypeVar("T")
Server = Annotated[str, Parameter(env_var="BATON_SERVER", help="HOST:PORT of the router.")]
Json = Annotated[bool, Parameter(negative=(), help="Print JSON for machines instead of text for people.")]
DEFAULT_SERVER = DEFAULT_LISTEN


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a command's coroutine on uvloop; Ctrl-C cancels it and comes out as KeyboardInterrupt."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFlags:
    """What every long-running process takes."""

    log_level: LogLevel = "info"
    """The least severe events to log; debug adds tracebacks to errors."""
    log_format: LogFormat = "auto"
    """json, console, or auto: json unless stderr is a terminal."""
    ready_fd: int | None = None
    """Write the address to this open descriptor when ready, instead of a line to stdout."""
    parent_pid: int | None = None
    """Die with this process, which must be the parent."""

    def prepare(self, role: str) -> None:
        """To be called first thing: ties the process to its parent and sets up its logs."""
        if self.parent_pid is not None:
            leave_terminal()
            die_with_parent(self.parent_pid)
        debug_errors(self.log_level)
        configure_logs(role, level=self.log_level, json={"json": True, "console": False}.get(self.log_format))


def debug_errors(level: LogLevel) -> None:
    """Errors of this process and its children come with a traceback when it logs at debug level."""
    if level == "debug":
        os.environ[DEBUG] = "1"


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFlags:
    """Everything about a request but its prompt. What is not given takes the server's default."""

    model: str | None = None
    """A model from `baton models`; may be left out when there is only one."""
    max_tokens: int | None = None
    """At most this many output tokens. Default: as many as the context has room for."""
    temperature: float | None = None
    """0 is greedy. Default: 1."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    min_p: float | None = None
    """Keep tokens at least this likely relative to the most likely one, in [0, 1]."""
    seed: int | None = None
    """Makes the draw repeatable. Default: minted by the router."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens seen so far; above 0."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens already in the output; -2 to 2."""
    frequency_penalty: float | None = None
    """Subtracted once per occurrence in the output; -2 to 2."""
    stop: list[str] | None = None
    """End before this text; may be given several times."""
    stop_token_ids: Annotated[list[int] | None, Parameter(name="--stop-token-id")] = None
    """End after this token; may be given several times."""
    ignore_eos: Annotated[bool, Parameter(negative=())] = False
    """Go on past the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Report log-probabilities with this many alternatives per token, 0 to 20."""
    ttft_ms: float | None = None
    """Objective: time to first token, in milliseconds."""
    tpot_ms: float | None = None
    """Objective: mean time per output token after the first, in milliseconds."""
    priority: int | None = None
    """Larger goes first among waiting prompts; -100 to 100."""
    when_unmet: WhenUnmet | None = None
    """What to do when the objectives can't be met."""
    on_disconnect: OnDisconnect | None = None
    """What to do when this client goes away."""
    tenant_salt: str | None = None
    """Share cached prefixes only with requests of the same salt."""
    request_id: str | None = None
    """A label for this request."""
    timeout: float | None = None
    """Give up after this many seconds."""

    def options(self) -> RequestOptions:
        """The SDK's arguments; what was not given is left out, `timeout` too, which the SDK takes by itself."""
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "timeout"}
        if not self.ignore_eos:
            del given["ignore_eos"]
        return cast(RequestOptions, given)


assert {field.name for field in fields(RequestFlags)} - {"timeout"} <= RequestOptions.__annotations__.keys()
