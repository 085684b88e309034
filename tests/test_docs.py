"""What the pages say of commands, flags, settings, counters and errors is so. Links and make targets: test_project."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from cyclopts import App

from baton import errors
from baton.cli.app import app
from baton.config import RouterConfig, WorkerConfig
from baton.rpc.status import KINDS, code_of
from baton.spec import RefusalReason

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PACKAGES = ("baton", "kvtransfer", "prefill_worker", "decode_worker", "router")
NOT_IN_THE_TREE = {"bench-results/", "vllm/", "llama/", "llama-native/", "model/", "model-hf/"}
"""What benchmarks write, and the folders of their peers."""


def text(name: str) -> str:
    return (DOCS / name).read_text()


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `baton` of every command line in a fenced block, and of every inline one."""
    content = page.read_text()
    blocks = re.findall(r"^```(?:sh|console)?\n(.*?)^```", content, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", content, flags=re.M | re.S))
    for line in lines:
        called = re.match(r"(?:\$ )?(?:\.venv/bin/)?(?:baton|(?:\.venv/bin/)?python -m baton\.cli) +([a-z].*)", line)
        if called and not re.match(r"[a-z]+ ready:|ready:", called[1]):
            yield shlex.split(called[1], comments=True)


@cache
def flags_of(name: str) -> frozenset[str]:
    """The flags of a command; KeyError when there is no such command."""
    found: App = app[name]
    arguments = found.assemble_argument_collection() if found.default_command else []
    return frozenset(flag for argument in arguments if argument.show for flag in argument.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_flags_exist(page: Path) -> None:
    for name, *words in commands(page):
        assert name in app, f"{page.name}: there is no `baton {name}`"
        given = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert given <= flags_of(name), f"{page.name}: `baton {name}` has no {sorted(given - flags_of(name))}"


def test_the_pages_name_commands_at_all() -> None:
    named = {name for page in PAGES for name, *_ in commands(page)}
    assert {"up", "router", "prefill", "decode", "generate", "status", "health"} <= named


def test_the_index_has_every_page() -> None:
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", text("README.md"))}
    assert {page for page in DOCS.rglob("*.md") if page != DOCS / "README.md"} <= linked


@pytest.mark.parametrize("config", [RouterConfig, WorkerConfig], ids=lambda config: config.__name__)
def test_every_setting_is_told_with_its_default(config: type) -> None:
    told = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \|", text("operations.md"), flags=re.M)
    for field in fields(config):
        default = field.default
        if default is MISSING:
            continue  # a worker's roles, which the command says
        rows = [value for name, value in told if name == field.name.replace("_", "-")]
        shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default}".removesuffix(".0")
        assert rows, f"operations.md has no row for --{field.name.replace('_', '-')}"
        assert shown in rows or default == "", f"--{field.name}: the default is {shown}, told: {rows}"


def counters() -> set[str]:
    """Every name that the code counts; `*` where it is put together."""
    found = set()
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        found |= {name for line in re.findall(r"counts\.add\((.+)\)", path.read_text()) for name in _names(line)}
    return found


def _names(arguments: str) -> list[str]:
    return [re.sub(r"\{.*?\}", "*", name) for name in re.findall(r'f?"([a-z_*{}.()]+)"', arguments)]


def test_every_counter_is_told() -> None:
    told = set(re.findall(r"`([a-z_*]+)`", text("operations.md").partition("### Counters")[2].partition("## Logs")[0]))
    assert {"handoffs", "late_*", "writes_failed"} <= counters(), "the search finds the counters"
    untold = {name for name in counters() if not any(fnmatch(name, pattern) for pattern in told)}
    assert untold - {"requests_*"} == set()  # three states, each told by itself


def test_every_exception_is_told_with_its_code() -> None:
    rows = re.findall(r"^\| (`.+?) \| `([A-Z_]+)` \|", text("protocol.md"), flags=re.M)
    told = {name: code for names, code in rows for name in re.findall(r"`(\w+)`", names)}
    abstract = {errors.BatonError, errors.FieldError, errors.Retryable}
    for name, kind in KINDS.items():
        if kind not in abstract:
            error = kind.__new__(kind)  # each takes other arguments; only its kind matters
            assert told.get(name) == code_of(error).name, name


def test_every_refusal_is_told() -> None:
    told = text("protocol.md")
    assert all(f"`{refusal.name}`" in told for refusal in RefusalReason if refusal)


def paths_on(page: Path) -> set[str]:
    """The files and folders that a page names in backticks, outside fenced blocks."""
    content = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    words = re.findall(r"`(\w[\w./-]*)`", content)
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return {
        word
        for word in words
        if re.search(r"/$|\w\.(?:py|proto|cpp|h|md)$", word) or ("/" in word and word.split("/")[0] in tops)
    } - NOT_IN_THE_TREE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_named_file_and_folder_exists(page: Path) -> None:
    """A short name stands for a file beside or below a path that the page names in full."""
    named = paths_on(page)
    folders = {folder for name in named if (ROOT / name).exists() for folder in (ROOT / name, *(ROOT / name).parents)}
    bases = {folder for folder in folders if folder.is_relative_to(ROOT)}
    missing = {name for name in named if not any((base / name).exists() for base in (ROOT, page.parent, *bases))}
    assert missing == set()


def test_the_pages_name_files_at_all() -> None:
    named = paths_on(DOCS / "structure.md")
    assert {"router/app.py", "attempt.py", "benchmarks/"} <= named


def test_every_module_is_in_structure() -> None:
    """Each module is listed once, under its folder, and each listed one exists; of benchmarks, the folders."""
    listed, folder = [], ""
    for line in text("structure.md").partition("## Every module")[2].splitlines():
        if heading := re.fullmatch(r"\*\*`(.+/)`\*\*", line):
            folder = heading[1]
        elif entry := re.match(r"- `(\w+)`: ", line):
            listed.append(folder + entry[1])
    modules = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules += [path.parent.relative_to(ROOT) for path in ROOT.glob("benchmarks/*/__init__.py")]
    stubs = Path("baton", "v1")
    there = [str(path.with_suffix("")) for path in modules if path.stem != "__init__" and stubs not in path.parents]
    assert sorted(listed) == sorted(there)
