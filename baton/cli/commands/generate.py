"""`baton generate`, `baton chat` and `baton tokenize`: what users send and get back."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import uvloop
from cyclopts import Parameter

from baton.cli.exits import INTERRUPTED, OK, report
from baton.cli.flags import DEFAULT_SERVER, Json, Server, run
from baton.cli.output import check_text, console, print_json, print_logprobs, read_text, show_stream, to_dict
from baton.cli.picture import Picture
from baton.client import Client, Event, Message, RequestOptions
from baton.client.client import deadline_of
from baton.errors import BatonError, InvalidArgument

OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)


def _no_option(kind: object, value: str) -> None:
    """A prompt may begin with a hyphen, but a mistyped option must not become one."""
    if OPTION.fullmatch(value):
        raise ValueError("It looks like an option; to send it, give - as the prompt and this on stdin.")


Prompt = Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)]
Raw = Annotated[bool, Parameter(negative=(), help="Send the text as it is, without the model's chat template.")]
System = Annotated[str | None, Parameter(help="A system message before the chat.")]
Ask = Callable[[list[Message]], AsyncIterator[Event]]
Timeout = Annotated[float | None, Parameter(help="Give up after this many seconds; inf is never.")]


def generate(
    prompt: Prompt,
    /,
    *,
    server: Server = DEFAULT_SERVER,
    raw: Raw = False,
    system: System = None,
    json: Json = False,
    timeline: Annotated[bool, Parameter(negative=(), help="Draw where the time went, on stderr.")] = False,
    timeout: Timeout = None,
    request: RequestOptions = RequestOptions(),  # noqa: B008
) -> None:
    """Stream one answer to the terminal.

    Parameters
    ----------
    prompt
        The question, as a user's chat message; - reads it from stdin.
    """
    text, options = _request(prompt, raw, system, request)

    async def main() -> None:
        async with Client(server) as client:
            events = client.generate(text, timeout=timeout, **options)
            finished, runs = await show_stream(events, as_json=json, spoken=[])
        if "logprobs" in request and not json:
            print_logprobs(runs)
        if timeline:
            console(sys.stderr).print(Picture(finished))

    run(main)


def tokenize(
    prompt: Prompt,
    /,
    *,
    server: Server = DEFAULT_SERVER,
    raw: Raw = False,
    system: System = None,
    model: str = "",
    json: Json = False,
) -> None:
    """Print the token ids that `baton generate` would send for the same prompt.

    Parameters
    ----------
    prompt
        The question, as a user's chat message; - reads it from stdin.
    model
        A model from `baton models`; may be left out when there is only one.
    """
    text, options = _request(prompt, raw, system, RequestOptions())

    async def main() -> None:
        async with Client(server) as client:
            result = await client.tokenize(text, messages=options.get("messages"), model=model)
        if json:
            print_json(to_dict(result))
        else:
            print(*result.ids)

    run(main)


def _request(prompt: str, raw: bool, system: str | None, given: RequestOptions) -> tuple[str | None, RequestOptions]:
    """The prompt as plain text, or None and the options with it as a chat."""
    text = read_text(prompt)
    if not raw:
        return None, {**given, "messages": [*_opening(system), ("user", text)]}
    if system is not None:
        raise InvalidArgument("system", "belongs to a chat, so it does not go with --raw")
    return text, given


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [("system", read_text(system, "system"))]


def chat(
    *,
    server: Server = DEFAULT_SERVER,
    system: System = None,
    json: Json = False,
    timeout: Timeout = None,
    request: RequestOptions = RequestOptions(),  # noqa: B008
) -> int:
    """Talk with a model, turn by turn. Ctrl-C cancels an answer, Ctrl-D ends.

    Without a terminal each line of stdin is a turn, and the first error ends it.
    """
    deadline_of(timeout)  # or each turn would fail
    messages = _opening(system)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  gives input() its line editing
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused with a message

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        client = runner.run(_connect(server))

        def ask(chat: list[Message]) -> AsyncIterator[Event]:
            options: RequestOptions = {**request, "messages": chat}
            return client.generate(timeout=timeout, **options)

        try:
            while (line := _read_turn(interactive)) is not None:
                status = _turn(runner, ask, messages, line, as_json=json) if line else 0
                if status and not interactive:
                    return status
        finally:
            runner.run(client.close())
    return 0


async def _connect(server: str) -> Client:
    return Client(server)


def _read_turn(interactive: bool) -> str | None:
    """The next line, stripped; "" for a line to skip; None at the end."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        if interactive:
            print()
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print("\nCtrl-D ends.")
        return ""


def _turn(runner: asyncio.Runner, ask: Ask, messages: list[Message], line: str, *, as_json: bool) -> int:
    """One question and its answer, added to `messages` as far as it came. Returns 0 or an exit status."""
    spoken: list[str] = []
    try:
        events = ask([*messages, ("user", check_text(line, "message"))])
        runner.run(show_stream(events, as_json=as_json, spoken=spoken))
    except KeyboardInterrupt:
        print("(cancelled)", file=sys.stderr)
        status = INTERRUPTED
    except BatonError as error:
        status = report(error)
    else:
        status = OK
    if any(spoken):
        messages += [("user", line), ("assistant", "".join(spoken))]
    return status
