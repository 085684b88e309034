"""`baton bench` as a process, against a server of known pace."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from baton import errors
from baton.bench.figures import results
from baton.bench.figures.results import read_json
from baton.bench.sending.driver import Progress
from baton.cli import main
from baton.cli.commands import bench_output
from tests.bench.paced import Paced
from tests.cli.runner import COMMAND, LIMIT_S, baton, environment
from tests.client.double import serving

# How late a busy machine makes the client is tested elsewhere.
SHORT = ["--max-late-ms", "10000", "--seconds", "0.6", "--rate", "50", "--prompt-tokens", "8", "--output-tokens", "4"]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Paced]:
    async with serving(Paced()) as paced:
        assert isinstance(paced, Paced)
        yield paced


async def test_a_run_writes_its_figures_its_rows_and_its_report(server: Paced, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("r.json", "r.csv", "r.html")]
    outputs = ["--json", files[0], "--csv", files[1], "--html", files[2]]
    classes = ["--class", "chat:1:ttft_ms=5000,tpot_ms=5000,priority=2", "--class", "bulk:1"]
    result = await baton("bench", "--server", server.address, *SHORT, *classes, *outputs)
    assert result.status == 0, result.err
    sent = len(server.requests)
    check_files(*map(Path, files), sent=sent)
    for told in ("TTFT", "TPOT", "ITL", "attainment", "goodput", "chat", "bulk", f"ended: {sent} OK"):
        assert told in result.out


def check_files(figures: Path, rows: Path, report: Path, *, sent: int) -> None:
    """All three tell of the same run."""
    found = json.loads(figures.read_text())
    assert found["summary"]["requests"] == sent > 10
    assert found["summary"]["statuses"] == {"OK": sent}
    assert (found["verdict"]["valid"], found["model"], set(found["classes"])) == (True, "tiny", {"bulk", "chat"})
    assert len(list(csv.DictReader(rows.read_text().splitlines()))) == sent
    assert report.read_text().count("<svg ") == 6


def test_where_a_run_stands_is_a_line_now_and_then_when_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_output, "PLAIN_EVERY_S", 0.0)
    with bench_output.watching() as screen:
        screen.watch(Progress(planned=9, elapsed_s=3.2, sent=4, ended=1, failed=1, tokens=77))
        monkeypatch.setattr(bench_output, "PLAIN_EVERY_S", 60.0)
        screen.watch(Progress(9))
        screen.watch(Progress(9))
    err = capsys.readouterr().err
    assert err.splitlines()[0] == "3 s  sent 4/9  under way 3  refused or failed 1  tokens 77"
    assert len(err.splitlines()) == 2
    assert "\x1b" not in err


async def test_two_results_are_compared(server: Paced, tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    await baton("bench", "--server", server.address, *SHORT, "--json", a)
    server.ttft_s = 0.2
    await baton("bench", "--server", server.address, *SHORT, "--seed", "5", "--json", b)
    result = await baton("bench", "--compare", a, b)
    assert (result.status, result.err) == (0, "")
    row = next(line.split() for line in result.out.splitlines() if line.startswith("ttft_ms p50"))
    assert float(row[-2]) > 2
    assert row[-1] == "worse"
    assert "differs: seed: 0, 5" in result.out


async def test_a_sweep_finds_what_the_server_can_keep(server: Paced, tmp_path: Path) -> None:
    """One place of 50 ms: of 64 sent within a second most wait for longer than one."""
    server.ttft_s, server.gap_s = 0.05, 0.0
    server.slots = asyncio.Semaphore(1)
    path = tmp_path / "s.json"
    load = f"--slo ttft_ms=1000 --output-tokens 1 --prompt-tokens 8 --json {path}".split()
    search = [
        "--sweep",
        "--rate",
        "16",
        "--max-late-ms",
        "10000",
        "--seconds",
        "1",
        "--burstiness",
        "0",
        "--tolerance",
        "0.6",
    ]
    result = await baton("bench", "--server", server.address, *search, *load)
    assert result.status == 0, result.err
    found = read_json(path)
    assert 16 <= found["found"]["rate"] < 64
    assert len(found["sweep"]) >= 3
    assert min(point["attainment"] for point in found["sweep"]) < 0.9
    assert "highest rate found" in result.out
    assert result.err.count("kept, goodput") == len(found["sweep"])
    prompts = [tuple(request.token_ids.ids) for request in server.requests]
    assert len(set(prompts)) == len(prompts), "what one rate sent is in the caches when the next one is tried"


async def test_what_can_be_written_is_written(
    server: Paced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full in the end: the figures are shown, and the other files are there."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_json", full)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert await asyncio.to_thread(main, ["bench", "--server", server.address, *SHORT, *files]) == 1
    shown = capsys.readouterr()
    assert "TTFT" in shown.out
    assert f"baton: json: can't write {files[1]}: no space left on device" in shown.err
    assert (tmp_path / "r.html").exists()


async def test_a_run_without_a_token_fails(server: Paced) -> None:
    server.error = errors.Unavailable("no worker", 1.0)
    result = await baton("bench", "--server", server.address, *SHORT)
    assert result.status == 1
    assert "no request got a token" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "rate: must be positive"),
        (["--rate", "fast"], "--rate"),
        (["--arrivals", "poisson"], "--arrivals"),
        (["--slo", "ttft=3"], "slo: expected ttft_ms"),
        (["--class", "chat"], "class: expected NAME:WEIGHT"),
        (["--prompt-tokens", "none"], "prompt_tokens: expected"),
        (["--trace", "nowhere.csv"], "trace: can't read nowhere.csv"),
        (["--attainment", "2"], "attainment: above 0"),
        (["--sweep", "--arrivals", "steps", "--steps", "1:1"], "sweep: steps"),
        (["--html", "no/such/folder/r.html"], "html: there is no folder"),
        (["--json", "/tmp"], "json: /tmp is a folder"),
        (["--compare", "a.json"], "--compare"),
        (["--compare", "a.json", "b.json"], "compare: can't read a.json"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None of these gets as far as a server, but for a trace and a sweep that can't be."""
    assert main(["bench", "--server", "127.0.0.1:1", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("baton: ")
    assert message in line


async def test_a_model_that_is_not_served(server: Paced) -> None:
    result = await baton("bench", "--server", server.address, "--model", "huge")
    assert (result.status, result.error_line) == (2, "model: 'huge' is not served; there is tiny")


async def test_nobody_there() -> None:
    result = await baton("bench", "--server", "127.0.0.1:1")
    assert result.status == 1
    assert "cannot reach 127.0.0.1:1" in result.error_line


async def test_ctrl_c_cancels_what_is_under_way(server: Paced) -> None:
    server.ttft_s = 60.0
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "bench", "--server", server.address, *SHORT, stderr=PIPE, stdout=PIPE, env=environment()
    )
    async with asyncio.timeout(LIMIT_S):
        while server.under_way < 5:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        while server.under_way:
            await asyncio.sleep(0.01)
    assert (process.returncode, out, err) == (130, b"", b"")


async def test_ctrl_c_in_a_sweep_keeps_the_rates_that_are_done(server: Paced, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "bench", "--server", server.address, "--sweep", *SHORT, "--json", str(path),
        stderr=PIPE, stdout=PIPE, env=environment(),
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(LIMIT_S):
        first = await process.stderr.readline()
        while not server.under_way:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert (process.returncode, first.count(b"kept, goodput")) == (130, 1)
    found = read_json(path)
    assert found["sweep"][0]["rate"] == 50
    assert found["found"]["rate"] >= 50
    assert "the search ended after" in found["verdict"]["warnings"][-1]
    assert "the search ended after" in out.decode()
