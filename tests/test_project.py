"""The project keeps its own rules: stubs, pins, packages, links, and no machine's name in a file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".git", ".venv", ".cache", ".hypothesis", "__pycache__", "build", "dist", "bench-results"}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Each is broken in two, so that this file does not hold what it looks for.
MACHINE_PATHS = ["/wo" "rk/", "/ro" "ot/", "/ho" "me/", "/op" "t/wheels", "/op" "t/pypi", "/tm" "p/bash"]  # fmt: skip
REGISTRY_HOSTS = [
    "pypi" ".org", "python" "hosted.org", "registry.np" "mjs.org", "download.py" "torch.org", "debian" ".org",
    "docker" ".io", "docker" ".com", "ghcr" ".io", "quay" ".io", "gcr" ".io", "nvcr" ".io",
]  # fmt: skip


def files(*suffixes: str) -> Iterator[Path]:
    """The project's own files: hidden caches, build output and the environment are not walked."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))]
        for name in names:
            path = Path(folder, name)
            if name not in NOT_OURS and not path.is_symlink() and (not suffixes or path.suffix in suffixes):
                yield path


def script(name: str) -> ModuleType:
    """scripts/NAME.py as a module: scripts is a folder of programs, not a package."""
    spec = importlib.util.spec_from_file_location(f"baton_scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_stubs_are_what_the_wire_contract_generates() -> None:
    ran = run(sys.executable, "scripts/stubs.py", "--check")
    assert ran.returncode == 0, ran.stderr


def test_a_stale_missing_or_left_over_stub_is_named() -> None:
    drift = script("stubs").drift
    assert drift({"a_pb2.py": "x"}, {"a_pb2.py": "x"}) == []
    assert drift({"a_pb2.py": "old"}, {"a_pb2.py": "new"}) == ["baton/v1/a_pb2.py: stale: -old"]
    assert drift({}, {"a_pb2.py": "new"}) == ["baton/v1/a_pb2.py: missing"]
    assert drift({"b_pb2.py": "x"}, {}) == ["baton/v1/b_pb2.py: comes from no .proto"]


def test_every_dependency_has_an_exact_pin_within_its_range() -> None:
    pins_py = script("pins")
    pins: dict[str, str] = pins_py.pinned() | pins_py.pinned(apart=True)
    for requirement in map(pins_py.Requirement, [*pins_py.declared(), *pins_py.declared(pins_py.APART)]):
        name = pins_py.canonicalize_name(requirement.name)
        assert name in pins, f"{name} of pyproject.toml is not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow the pin {pins[name]}"


def test_what_the_dependencies_need_is_pinned_and_installed() -> None:
    pins_py = script("pins")
    versions, missing = pins_py.resolved(pins_py.declared())
    assert missing == []
    assert pins_py.drift(pins_py.pinned(), versions) == []


def test_a_wrong_pin_is_named() -> None:
    drift = script("pins").drift
    assert drift({"torch": "2", "pip": "1"}, {"torch": "2", "nvidia-cublas": "13", "triton": "3"}) == []
    assert drift({"torch": "1"}, {"torch": "2"}) == ["torch: 2 here, pinned 1"]
    assert drift({}, {"torch": "2"}) == ["torch: 2 is not pinned"]
    assert drift({"attrs": "1"}, {}) == ["attrs: pinned, but nothing reaches it"]


def test_every_top_level_package_is_installed_checked_and_layered() -> None:
    tools = PROJECT["tool"]
    unshipped = {"tests", "benchmarks"}
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - unshipped
    assert found == set(tools["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert found | unshipped == set(tools["mypy"]["packages"])
    assert found == set(tools["importlinter"]["root_packages"])


def test_packages_import_from_any_folder(tmp_path: Path) -> None:
    ran = run(sys.executable, "-c", "import baton, decode_worker, kvtransfer, prefill_worker, router", cwd=tmp_path)
    assert ran.returncode == 0, f"run `make setup`: {ran.stderr}"


def test_no_file_names_a_registry_host_or_a_place_on_a_machine() -> None:
    hosts = "|".join(re.escape(host) for host in REGISTRY_HOSTS)
    paths = "|".join(re.escape(path) for path in MACHINE_PATHS)
    pattern = re.compile(rf"(?<![\w-])(?:{hosts})\b|(?<![\w.$}}/-])(?:{paths})")
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def anchors(text: str) -> set[str]:
    """The fragments that a Markdown page's headings can be linked by, as the usual renderers make them."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_the_documents_lead_somewhere() -> None:
    broken = []
    for page in files(".md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, fragment = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            if not linked.exists() or (
                fragment and linked.suffix == ".md" and fragment not in anchors(linked.read_text())
            ):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_make_lists_every_target() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+)", run("make").stdout, flags=re.M))
    assert listed == make_targets()


@pytest.mark.parametrize("page", [*files(".md"), ROOT / ".ci" / "run"], ids=lambda page: page.name)
def test_documents_name_only_targets_that_exist(page: Path) -> None:
    named = set(re.findall(r"(?:`|^\$? *|&& )make ([a-z][a-z-]*)(?=`| *$| +[A-Z#])", page.read_text(), flags=re.M))
    named |= set(re.findall(r"^step ([a-z-]+)", page.read_text(), flags=re.M))
    assert named <= make_targets()


def test_an_old_or_missing_python_is_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "oldpython"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2"\nexit 1\n')
    old.chmod(0o755)
    copied = ["Makefile", "pyproject.toml", "constraints.txt"]
    for name in copied:
        (tmp_path / name).write_text((ROOT / name).read_text())
    for python, told in ((str(old), "is Python 3.9.2"), ("no-such-python", "there is no 'no-such-python'")):
        ran = run("make", "setup", f"PYTHON={python}", cwd=tmp_path)
        assert ran.returncode != 0
        line, rest = ran.stderr.split("\n", 1)
        assert line.startswith("Baton needs Python 3.11 or newer")
        assert told in line
        assert "Traceback" not in rest
    assert not (tmp_path / ".venv").exists()
