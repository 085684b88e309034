"""The timeline's picture: proportions, and what a terminal can show."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from baton.cli.picture import BAR_CELLS, Picture, bars, span
from baton.client import Finished
from baton.client.wire import event_from_wire
from tests.client.double import finished


def a_result() -> Finished:
    event = event_from_wire(finished())
    assert isinstance(event, Finished)
    return event


def render(result: Finished, *, encoding: str = "utf-8", **settings: object) -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=80, highlight=False, markup=False, **settings).print(Picture(result))  # type: ignore[arg-type]
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_bars_are_proportional_and_end_to_end() -> None:
    lines = render(a_result())
    assert [line.split("│")[0].strip() for line in lines[:6]] == [
        "router",
        "queue",
        "prefill",
        "transfer",
        "wait",
        "decode",
    ]
    bars = [line.split("│")[1] for line in lines[:6]]
    assert all(len(bar) == BAR_CELLS for bar in bars)
    assert bars[2].count("█") == round(BAR_CELLS * 50 / 70) - round(BAR_CELLS * 3 / 70)
    assert bars[5].endswith("█")
    assert all("█" in bar for bar in bars), "what took any time is seen"
    assert all(len(line) <= 80 for line in lines)
    assert "47.0 ms  prefill-0" in lines[2]
    assert "0.5 ms  shm, 1 blocks, 369 kB" in lines[3]
    assert lines[6].strip() == "TTFT 50.0 ms, TPOT 10.0 ms, 5 tokens in, 3 out, 70 ms in all"


def test_a_plain_terminal_gets_plain_characters() -> None:
    lines = render(a_result(), encoding="ascii")
    assert "#" in lines[2]
    assert lines[2].count("|") == 2


def test_colour_only_where_the_terminal_has_it() -> None:
    assert "\x1b[" not in "".join(render(a_result()))
    assert "\x1b[32m" in "".join(render(a_result(), force_terminal=True, color_system="standard"))


def test_a_phase_that_did_not_take_place_has_no_bar() -> None:
    result = a_result()
    short = replace(
        result.timeline,
        transfer_ms=None,
        transfer_exposed_ms=None,
        first_step_wait_ms=None,
        decode_ms=None,
        tpot_ms=None,
        transport="",
        decode_worker="",
    )
    lines = render(replace(result, timeline=short))
    assert [("█" in line, line.rstrip().endswith("-")) for line in lines[3:6]] == [(False, True)] * 3
    assert "TPOT" not in lines[6]
    assert [bar.ms for bar in bars(short)] == [1.0, 2.0, 47.0, None, None, None]


def test_spans_stay_in_the_frame() -> None:
    assert span(0, 0, 0) == (0, 0)
    assert span(10, 0.001, 10) == (BAR_CELLS - 1, 1)
    assert span(0, 10, 10) == (0, BAR_CELLS)
