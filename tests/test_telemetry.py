"""What others sent can't write lines of its own into a log."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.texts import ALPHABETS

LOGS = """
import logging, sys, structlog
from baton.telemetry import configure_logs
configure_logs("test", json=sys.argv[1] == "json")
text = "\\x00\\x1b[2J\\r\\nfake line\\x7f\\u202e\\u2028\\ud800"
structlog.get_logger().info("request ended", request_id=text)
logging.getLogger("library").warning("refused %s", text)
try:
    raise ValueError("a bug")
except ValueError:
    structlog.get_logger().exception("unexpected error")
"""


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_text_stays_on_its_line(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOGS, form], check=True, capture_output=True)
    lines = done.stderr.decode().splitlines()
    assert len(done.stdout) == 0
    assert sum("fake line" in line for line in lines) == 2
    assert not any(line.startswith("fake line") for line in lines)
    bad = {character for text in ALPHABETS.values() for character in text if not character.isprintable()} - {"\x1b"}
    assert not bad & set("".join(lines))
    assert "\x1b[2J" not in done.stderr.decode()
    if form == "json":
        assert len([json.loads(line) for line in lines]) == 3
    else:
        assert any(line.startswith("Traceback") for line in lines), "a traceback keeps its lines"
