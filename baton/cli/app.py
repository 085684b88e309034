"""The command line: which commands there are, and how each ends.

Nothing here imports a role or torch; a command imports its role when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from cyclopts import App, CycloptsError, Group, Parameter

from baton.cli.commands import bench, chaos, demo, generate, inspection, model, roles, up
from baton.cli.exits import DEBUG, OK, USAGE, report


def version() -> str:
    """Print the version."""
    try:
        return installed_version("baton")
    except PackageNotFoundError:
        return "unknown: not installed, run from a checkout"


CLUSTER, CLIENT, OPERATIONS, MORE = (
    Group.create_ordered(name) for name in ("Start a cluster", "Use a cluster", "Look at a cluster", "More")
)


def shown_default(value: object) -> str | None:
    """None, which shows nothing, for a switch that is off and for what is empty."""
    return None if value is False or value in ("", [], None) else str(value)


app = App(
    name="baton",
    help="LLM serving split into prefill and decode workers, over gRPC.",
    version=version,
    help_format="plaintext",
    group_commands=MORE,
    default_parameter=Parameter(negative_iterable=(), show_default=shown_default),
)
for group, commands in (
    (CLUSTER, (up.up, roles.router, roles.prefill, roles.decode, demo.demo, chaos.chaos)),
    (CLIENT, (generate.generate, generate.chat, generate.tokenize, bench.bench)),
    (OPERATIONS, (inspection.workers, inspection.models, inspection.status, inspection.explain, inspection.health)),
):
    for command in commands:
        app.command(command, group=group)
app.command(model.app)


@app.command(name="version")
def print_version() -> None:
    """Print the version."""
    print(f"baton {version()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this process's) and returns its exit status. Errors are one line on stderr."""
    if not os.environ.get(DEBUG):
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines would stand beside ours
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        print(f"baton: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the outermost boundary: what is left gets its line here
        return report(error)
    return status if isinstance(status, int) else OK
