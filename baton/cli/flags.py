"""Flags that several commands share, made from classes of settings; the attribute docstrings are the help texts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import uvloop
from cyclopts import Group, Parameter

from baton.children import die_with_parent
from baton.cli.exits import DEBUG
from baton.client.types import RequestOptions
from baton.config import DEFAULT_LISTEN, GROUPS, PROCESS, LogLevel, LogSettings, marks_of
from baton.launch.lifetime import leave_terminal
from baton.telemetry import configure_logs

T = TypeVar("T")
Server = Annotated[str, Parameter(env_var="BATON_SERVER", help="HOST:PORT of the router.")]
Json = Annotated[bool, Parameter(negative=(), help="Print JSON for machines instead of text for people.")]
DEFAULT_SERVER = DEFAULT_LISTEN
HEADINGS = {name: Group.create_ordered(name) for name in GROUPS}


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a command's coroutine on uvloop; Ctrl-C cancels it and comes out as KeyboardInterrupt."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def as_flags(names: Collection[str] | None = None, **own: Parameter) -> Callable[[type[T]], type[T]]:
    """Lets a command take the fields of a class as flags: those of these `names`, or all, each under the heading of its
    `Setting`. `own` tells more of single flags.

    The class gets the resolved annotations, so that its module need not import the names in those that it inherits.
    """

    def make(kind: type[T]) -> type[T]:
        hints = get_type_hints(kind, include_extras=True)
        for name, hint in hints.items():
            marks = [Parameter(parse=names is None or name in names), own.get(name)]
            marks += [Parameter(group=HEADINGS[mark.group]) for mark in marks_of(hint)]
            kind.__annotations__[name] = Annotated[hint, Parameter.combine(*marks)]
        if is_dataclass(kind):
            kind.__init__.__annotations__.update(hints)
        return Parameter(name="*")(kind)

    return make


@as_flags()
@dataclass(frozen=True, kw_only=True)
class ProcessFlags(LogSettings):
    """What every role's process takes."""

    ready_fd: Annotated[int | None, PROCESS] = None
    """Write the address to this open descriptor when ready, instead of a line to stdout."""
    parent_pid: Annotated[int | None, PROCESS] = None
    """Die with this process, which must be the parent."""

    def prepare(self, role: str) -> None:
        """Ties the process to its parent and sets up its logs. Call it first."""
        if self.parent_pid is not None:
            leave_terminal()
            die_with_parent(self.parent_pid)
        debug_errors(self.log_level)
        configure_logs(role, level=self.log_level, json={"json": True, "console": False}.get(self.log_format))


def debug_errors(level: LogLevel) -> None:
    """Errors of this process and its children come with a traceback when it logs at debug level."""
    if level == "debug":
        os.environ[DEBUG] = "1"


# A request's flags are the SDK's own options, all but the prompt's other forms.
as_flags(
    RequestOptions.__annotations__.keys() - {"messages", "token_ids"},
    stop_token_ids=Parameter(name="--stop-token-id"),
    ignore_eos=Parameter(negative=()),
)(RequestOptions)
