"""The command line. `baton --help` lists the commands; docs/cli.md describes them."""

from baton.cli.app import main

__all__ = ["main"]
