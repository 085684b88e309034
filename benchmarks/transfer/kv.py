"""Block transfers beside plain copies, a raw socket and NIXL: `make bench-kv`.

One host, one interleaved run; the sender has the first core and the receiver the last. KV of 1,024 and 4,096 tokens of
the embedded model, in blocks scattered over both pools. NIXL's rows are there when the package is.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys

from benchmarks.report import Row, publish, spread
from benchmarks.transfer.kv_ends import LAYOUT, Remote

TOKENS = (1024, 4096)
ROUNDS = 11
WARM = 2
OURS = ("copy", "scattered", "streamed", "shm", "socket", "tcp")
NIXL = ("nixl block", "nixl layer")
UCX: dict[str, dict[str, str]] = {"shm": {}, "tcp": {"UCX_TLS": "tcp"}}
"""Without a choice of ours NIXL takes what it holds for the fastest on one host."""

Rates = dict[tuple[str, int], list[float]]


def measure(rounds: int) -> Rates:
    """GB/s by (way, tokens), one figure for each round."""
    cores = sorted(os.sched_getaffinity(0))
    pairs: dict[str, tuple[tuple[str, ...], tuple[Remote, Remote]]] = {"": (OURS, _pair(cores, {}))}
    if importlib.util.find_spec("nixl") is not None:
        pairs |= {name: (NIXL, _pair(cores, tls)) for name, tls in UCX.items()}
    try:
        for kinds, (sender, receiver) in pairs.values():
            for kind in kinds:
                sender.call("send", kind, receiver.call("receive", kind) if _remote(kind) else None)
        rates: Rates = {}
        for round_ in range(rounds + WARM):
            for tokens in TOKENS:
                blocks = LAYOUT.blocks_for(tokens)
                for over, (kinds, (sender, receiver)) in pairs.items():
                    for kind in kinds:
                        if kind in NIXL:
                            receiver.call("poll", kind, True)
                        seconds = sender.call("run", kind, blocks)
                        if kind in NIXL:
                            receiver.call("poll", kind, False)
                        if kind in ("shm", "tcp") and not receiver.call("check", blocks):
                            raise AssertionError(f"{kind} brought other bytes than were sent")
                        if round_ >= WARM:
                            name = f"{kind} over {over}" if over else kind
                            rates.setdefault((name, tokens), []).append(blocks * LAYOUT.block_bytes / seconds / 1e9)
        return rates
    finally:
        for _, (sender, receiver) in pairs.values():
            sender.close()
            receiver.close()


def _pair(cores: list[int], environment: dict[str, str]) -> tuple[Remote, Remote]:
    return Remote(cores[0], 1, environment), Remote(cores[-1], 0, environment)


def _remote(kind: str) -> bool:
    return kind not in ("copy", "scattered", "streamed")


def rows(rates: Rates) -> list[Row]:
    """Ours beside each peer; the raw figures come last."""
    found = []
    for tokens in TOKENS:
        for ours, peer, least in (
            ("shm", "copy", 0.85),
            ("shm", "nixl block over shm", 2.0),
            ("shm", "nixl layer over shm", 2.0),
            ("tcp", "socket", 0.7),
            ("tcp", "nixl block over tcp", 1.0),
            ("tcp", "nixl layer over tcp", 1.0),
        ):
            if (peer, tokens) in rates:
                found.append(_row(rates, tokens, ours, peer, least))
        found.extend(_row(rates, tokens, name, "copy", None) for name in ("scattered", "streamed"))
    return found


def _row(rates: Rates, tokens: int, ours: str, peer: str, least: float | None) -> Row:
    mine, theirs = rates[ours, tokens], statistics.median(rates[peer, tokens])
    figure = statistics.median(mine)
    target = "" if least is None else f"at least {least:g} x"
    met = None if least is None else figure >= least * theirs
    return Row(f"{ours}, {tokens:,} tokens", "GB/s", figure, peer, theirs, True, target, met, spread(mine))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    sys.exit(0 if publish("kv", rows(measure(rounds))) else 1)


if __name__ == "__main__":
    main()
