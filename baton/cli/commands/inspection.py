"""`baton workers`, `status`, `explain`, `health` and `models`: what operators look at."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from baton.cli.exits import FAILURE, OK
from baton.cli.flags import DEFAULT_SERVER, Json, Server, run
from baton.cli.output import print_json, print_table, show, to_dict
from baton.client import Client, ProcessStatus, WorkerInfo
from baton.client.reports import Candidate, Pair, Placement

T = TypeVar("T")


def workers(*, server: Server = DEFAULT_SERVER, json: Json = False) -> None:
    """List the workers that the router knows, and what is missing."""
    found = _ask(server, lambda client: client.workers())
    columns = "name", "roles", "model", "address", "attached", "lease", "waiting", "running", "blocks", "kept"
    if json:
        print_json({"workers": [to_dict(worker) for worker in found], "degraded": found.degraded})
        return
    print_table((*columns, "transports", "pairs"), map(_worker_row, found))
    for worker in found:
        for transport, note in sorted(worker.load.pair_notes.items()):
            print(f"{worker.name} uses {transport}: {note}")
    for line in found.degraded:
        print(f"degraded: {line}")


def _worker_row(worker: WorkerInfo) -> list[object]:
    load, known = worker.load, worker.predictions
    return [
        worker.name,
        ", ".join(worker.roles),
        worker.model,
        worker.address,
        "yes" if worker.attached else "no",
        f"{worker.lease_left_ms / 1e3:.1f} s",
        load.waiting,
        load.running,
        f"{load.held_blocks + load.quarantined_blocks}/{worker.blocks}",
        f"{known.kept / known.promised:.0%}" if known is not None and known.promised else "-",
        ", ".join(worker.transports),
        ", ".join(f"{count} {transport}" for transport, count in sorted(load.pairs.items())) or "-",
    ]


def models(*, server: Server = DEFAULT_SERVER, json: Json = False) -> None:
    """List the models that the cluster serves."""
    found = _ask(server, lambda client: client.models())
    rows = ([m.name, m.context_tokens, m.prefill_workers, m.decode_workers, m.fingerprint] for m in found)
    show(found, json, ("name", "context", "prefill", "decode", "fingerprint"), rows)


def status(address: str | None = None, /, *, server: Server = DEFAULT_SERVER, json: Json = False) -> None:
    """Show what a process holds, and whether its books balance.

    Parameters
    ----------
    address
        HOST:PORT of a router or a worker. Default: the server.
    """
    found = _ask(address or server, lambda client: client.status())
    show(found, json, ("what", "value"), _status_rows(found))


def _status_rows(found: ProcessStatus) -> list[list[object]]:
    rows: list[list[object]] = [
        ["name", found.name],
        ["address", found.address],
        ["incarnation", found.incarnation],
        ["roles", ", ".join(found.roles) or "router"],
        ["resident memory", f"{found.resident_bytes / 1e6:.0f} MB"],
    ]
    rows += [["degraded", line] for line in found.degraded]
    if found.weight_bytes:
        rows.append(["weights", f"{found.weight_bytes / 1e6:.0f} MB"])
    if found.pool is not None:
        pool = found.pool
        states = f"{pool.free} free, {pool.held} held, {pool.cached} cached, {pool.quarantined} quarantined"
        rows.append(["pool", f"{pool.bytes / 1e6:.0f} MB, {pool.blocks} blocks: {states}"])
        rows.append(["pool integrity", pool.integrity_error or "ok"])
    rows += [[f"pair {pair.peer}", _pair_text(pair)] for pair in found.pairs]
    rows += [[f"live {name}", value] for name, value in sorted(found.live.items())]
    rows += [[f"count {name}", value] for name, value in sorted(found.counters.items())]
    return rows


def _pair_text(pair: Pair) -> str:
    return f"{pair.transport}, {pair.handoffs} under way" + (f"; {pair.note}" if pair.note else "")


def explain(request_id: str, /, *, tenant_salt: str = "", server: Server = DEFAULT_SERVER, json: Json = False) -> None:
    """Show why a request went where it did: the workers that were considered, and the prediction for each.

    Parameters
    ----------
    request_id
        The request's label, from the client or from `Accepted`.
    tenant_salt
        The request's own, if it had one.
    """
    found = _ask(server, lambda client: client.explain(request_id, tenant_salt=tenant_salt))
    if json:
        print_json([to_dict(placement) for placement in found])
        return
    for placement in found:
        print(f"{placement.step}: {_verdict(placement)}{placement.chosen}: {placement.reason}{_times(placement)}")
        print_table(("worker", "way", "fits", "ttft", "tpot", "note"), map(_candidate_row, placement.candidates))
        if placement.others:
            print(f"and {placement.others} others")


def _verdict(placement: Placement) -> str:
    if placement.refused:
        return f"REFUSED for {placement.constraint}; it would have gone to "
    return "" if placement.meets else f"not all objectives can be kept ({placement.constraint}); "


def _times(placement: Placement) -> str:
    named = (("ttft", placement.ttft_ms), ("tpot", placement.tpot_ms))
    times = [f"{name} {value:.0f} ms" for name, value in named if value is not None]
    return f"; {'expected' if placement.refused else 'promised'} {', '.join(times)}" if times else ""


def _candidate_row(found: Candidate) -> list[object]:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    fits = "yes" if found.feasible else "no"
    return [found.worker, found.way or "-", fits, shown(found.ttft_ms), shown(found.tpot_ms), found.note]


def health(
    address: str,
    /,
    *,
    service: Annotated[str, Parameter(help="liveness, readiness, or a service's full name.")] = "",
    json: Json = False,
) -> int:
    """Ask a process how it is, over the gRPC health protocol; exit status 0 when it serves, else 1.

    Parameters
    ----------
    address
        HOST:PORT of a router or a worker.
    """
    state = _ask(address, lambda client: client.health(service))
    if json:
        print_json({"address": address, "service": service, "status": state})
    else:
        print(state)
    return OK if state == "serving" else FAILURE


def _ask(address: str, question: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    async def main() -> T:
        async with Client(address) as client:
            return await question(client)

    return run(main)
