"""The shape of the tree: small files, small folders, and one meaning for each class name."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("baton", "router", "prefill_worker", "decode_worker", "kvtransfer")
STUBS = ROOT / "baton" / "v1"
CLIENT = ROOT / "baton" / "client"
"""The SDK, whose users see no other package: its `Accepted` or `Refusal` may be another than the inside has."""
MAX_MODULES = 12
MAX_LINES = 300


def modules(*packages: str) -> Iterator[Path]:
    """The Python files of these top-level folders, `__init__` among them and generated stubs not."""
    for package in packages:
        yield from (path for path in sorted((ROOT / package).rglob("*.py")) if path.parent != STUBS)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_classes(path: Path) -> list[str]:
    """The names of the classes that a module defines at any depth, those with a leading underscore aside."""
    found = (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
    return [name for name in found if not name.startswith("_")]


def test_no_folder_has_more_modules_than_fit_in_one_glance() -> None:
    counts = Counter(path.parent for path in modules(*PACKAGES, "benchmarks") if path.name != "__init__.py")
    found = [f"{shown(folder)}: {count} modules" for folder, count in counts.items() if count > MAX_MODULES]
    assert not found, "\n".join(found)


def test_no_file_has_two_subjects() -> None:
    lengths = {path: path.read_text().count("\n") for path in modules(*PACKAGES, "benchmarks", "tests", "scripts")}
    found = [f"{shown(path)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]
    assert not found, "\n".join(found)


def test_a_class_name_has_one_meaning() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path in modules(*PACKAGES):
        if not path.is_relative_to(CLIENT):
            for name in public_classes(path):
                places[name].append(shown(path))
    found = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert not found, "\n".join(found)
