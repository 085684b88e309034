"""The real thing: `baton up` with the embedded model, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.cli.runner import COMMAND, baton, environment
from tests.launch.processes import wait_gone

ROOT = Path(__file__).parents[2]
STOP_S = 15.0
READY = re.compile(r"baton ready: (127\.0\.0\.1:\d+) \(1 prefill, 1 decode, smollm2-135m\)\n")
pytestmark = pytest.mark.timeout(180)


@contextmanager
def up(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[int]]]:
    """The process, its address and the process ids of its children; killed at the end if it still runs."""
    command = [*COMMAND, "up", "--listen", "127.0.0.1:0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        process_group=0,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = READY.fullmatch(process.stdout.readline())
        assert ready is not None, process.stderr.read()
        yield process, ready[1], [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    finally:
        process.kill()
        process.communicate(timeout=STOP_S)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of one cluster for the tests that only ask."""
    with up() as (_, address, _):
        yield address


def test_ctrl_c_stops_it_cleanly() -> None:
    with up() as (process, _, children):
        assert len(children) == 3
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        out, err = process.communicate(timeout=STOP_S)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err
        assert wait_gone(children) == []


def test_killing_it_leaves_no_process_and_no_port() -> None:
    with up() as (process, address, children):
        process.kill()
        process.wait(timeout=STOP_S)
        assert wait_gone(children) == []
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        pass


def test_the_workers_die_without_their_parent_even_while_starting() -> None:
    process = subprocess.Popen(
        [*COMMAND, "up", "--listen", "127.0.0.1:0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    family = psutil.Process(process.pid)
    try:
        while len(family.children()) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        children = [child.pid for child in family.children()]
    finally:
        process.kill()
        process.wait(timeout=STOP_S)
    assert wait_gone(children) == []


async def test_a_broken_model_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    result = await baton("up", "--listen", "127.0.0.1:0", "--model", str(broken))
    assert (result.status, result.out) == (2, "")
    assert "broken.gguf" in result.error_line


async def test_generate_answers(cluster: str) -> None:
    result = await baton("generate", "--temperature", "0", "What is the capital of France?", "--server", cluster)
    assert (result.status, result.out, result.err) == (0, "The capital of France is Paris.\n", "")


async def test_chat_and_tokenize_agree(cluster: str) -> None:
    ids = json.loads((await baton("tokenize", "hi", "--json", "--server", cluster)).out)["ids"]
    result = await baton("chat", "--json", "--max-tokens", "1", "--server", cluster, stdin=b"hi\n")
    first = json.loads(result.out.splitlines()[0])
    assert first["prompt_tokens"] == len(ids)


async def test_both_workers_are_listed(cluster: str) -> None:
    workers = json.loads((await baton("workers", "--json", "--server", cluster)).out)["workers"]
    assert sorted((worker["name"], *worker["roles"], worker["attached"]) for worker in workers) == [
        ("decode-0", "decode", True),
        ("prefill-0", "prefill", True),
    ]
    for worker in workers:
        assert (await baton("health", worker["address"])).status == 0
        status = json.loads((await baton("status", worker["address"], "--json")).out)
        assert status["pool"]["integrity_error"] == ""


async def test_bad_requests_are_status_2_and_name_the_field(cluster: str) -> None:
    for flags, field in (
        (["--top-p", "2"], "sampling.top_p"),
        (["--temperature", "nan"], "sampling.temperature"),
        (["--model", "nobody"], "nobody"),
    ):
        result = await baton("generate", "hi", "--server", cluster, *flags)
        assert field in result.error_line
        assert (result.status, result.out) == (2, "")


def test_the_readmes_example_runs(cluster: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 15, "it should stay short"
    done = subprocess.run(
        [sys.executable, "-c", example.replace("127.0.0.1:9700", cluster)],
        capture_output=True,
        text=True,
        timeout=STOP_S,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "The capital of France is Paris."


async def test_the_demo_answers_right() -> None:
    result = await baton("demo")
    assert result.status == 0
    for answer in ("The capital of France is Paris.", "H2O", " 4."):
        assert answer in result.out
    assert result.out.count("decode-0") == 3
    assert max(map(len, result.out.splitlines())) <= 80
