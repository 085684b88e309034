"""The report: one HTML file without scripts and external resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from baton.bench.figures.metrics import Summary
from baton.bench.figures.results import Measurement
from baton.bench.report.charts import charts_of
from baton.bench.report.svg import render
from baton.bench.report.tables import Table, class_table, client_table, latency_table, overview, promise_table
from baton.bench.sending.records import Record

STYLE = """
:root{color-scheme:light dark;--bg:#fcfcfa;--fg:#1d2329;--soft:#5b6670;--line:#dfe3e6;--card:#fff;--band:#f3dfb0;
--c0:#2563b8;--c1:#c2571a;--c2:#2e8555;--c3:#8a4fb0;--c4:#a8324a;--c5:#53707f;--good:#2e8555;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e4e8eb;--soft:#9aa6af;--line:#313a42;--card:#1b2126;
--band:#4a4022;--c0:#74a9f2;--c1:#f09a63;--c2:#6cc996;--c3:#c493e6;--c4:#f0839a;--c5:#9fb9c7;--good:#6cc996;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1560px;padding:28px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}h1{font-size:24px;margin:0}h2{font-size:17px;
margin:30px 0 10px}.soft,.none{color:var(--soft)}ul.verdict{list-style:none;padding:0;margin:16px 0}
ul.verdict li{border-left:4px solid var(--c1);background:var(--card);padding:6px 12px;margin:4px 0}
ul.verdict li.good{border-color:var(--good)}ul.verdict li.bad{border-color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;background:var(--card);font-variant-numeric:tabular-nums}
th,td{padding:5px 14px;border:1px solid var(--line);text-align:right;white-space:nowrap}th{font-weight:600}
td:first-child,th:first-child{text-align:left}.plots{display:grid;gap:18px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr))}figure{margin:0;padding:14px;background:var(--card);
border:1px solid var(--line);border-radius:6px}figcaption{font-weight:600}.legend{font-size:13px;color:var(--soft);
min-height:20px}.key{margin-right:14px}.key i{display:inline-block;width:14px;height:4px;border-radius:2px;
margin-right:5px;vertical-align:middle}.key i.kband{height:11px;background:var(--band)}svg{width:100%;height:auto;
display:block}svg text{font:12px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--soft)}
svg .label{fill:var(--fg)}
svg .note{fill:var(--fg);font-size:11.5px;paint-order:stroke;stroke:var(--card);stroke-width:4px}
.grid{stroke:var(--line);stroke-width:1}
.rule{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 4}.band{fill:var(--band)}svg path{fill:none;
stroke-width:2;stroke-linejoin:round}dl{columns:2;column-gap:40px;max-width:900px}dt{float:left;clear:left;
color:var(--soft)}dd{margin:0 0 2px 190px;overflow-wrap:anywhere}
""" + "".join(
    f".k{i}{{background:var(--c{i})}}.c{i}{{stroke:var(--c{i})}}.s{i}{{fill:var(--c{i})}}" for i in range(6)
)  # fmt: skip
NOTES = (
    "Latencies count from the time a request was due, not from when it was sent. TTFT: to the first tokens. TPOT: "
    "from first to last token, over the tokens after the first. ITL: between one event with tokens and the next. "
    "Attainment: the share of all requests that ended well and kept every objective. Goodput: such requests per "
    "second of the window in which requests were due."
)


def write_page(found: Measurement, records: Sequence[Record], path: Path) -> None:
    """Raises OSError."""
    path.write_text(page(found, records), encoding="utf-8")


def page(found: Measurement, records: Sequence[Record]) -> str:
    plots = "".join(render(chart) for chart in charts_of(found, records))
    summary = found.summary
    tables = [latency_table(summary), class_table(found.classes), promise_table(summary), client_table(found.health)]
    body = (
        f"<h1>baton bench</h1><p class=soft>{escape(_headline(found))}</p>{_verdict(found)}"
        f"{_table(overview(found.summary))}<h2>Plots</h2><div class=plots>{plots}</div>"
        f"{''.join(f'<h2>{escape(table.title)}</h2>{_table(table)}' for table in tables if table.rows)}"
        f"{_errors(found.summary)}<h2>The load</h2><dl>{_settings(found)}</dl><p class=soft>{escape(NOTES)}</p>"
    )
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width"><title>baton bench</title>'
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def _headline(found: Measurement) -> str:
    swept = f", the best of {len(found.sweep)} rates" if found.sweep else ""
    return f"{found.model} at {found.address}, {found.at}: {found.summary.rate:.4g} requests/s{swept}"


def _verdict(found: Measurement) -> str:
    if not found.verdict.warnings:
        return "<ul class=verdict><li class=good>Valid: the client kept up.</li></ul>"
    kind = "" if found.verdict.valid else " class=bad"
    return f"<ul class=verdict>{''.join(f'<li{kind}>{escape(text)}</li>' for text in found.verdict.warnings)}</ul>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _errors(summary: Summary) -> str:
    rows = [[status, str(count)] for status, count in sorted(summary.statuses.items())]
    rows += [[f"refused for {name}", str(count)] for name, count in sorted(summary.refusals.constraints.items())]
    return "<h2>How requests ended</h2>" + _table(Table("", ("status", "requests"), rows))


def _settings(found: Measurement) -> str:
    settings = asdict(found.config) | (asdict(found.search) if found.search else {})
    given = {name: value for name, value in settings.items() if value not in (None, "", [])}
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in given.items())
