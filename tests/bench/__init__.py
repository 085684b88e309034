"""Benchmarks, each a module that `make bench-NAME` runs."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines would stand between a table's
