"""Write constraints.txt from what this environment has, or tell where the two differ.

    python scripts/pins.py           write it
    python scripts/pins.py --check   write nothing; exit 1 and name what differs

Pinned is what pyproject.toml reaches (dependencies, extras, dev group, build system; of the extras in `APART` only what
is installed, the others keep their pins), followed through the installed packages' own requirements. To move a pin:
`.venv/bin/pip install -U NAME`, `make pins`, `make test`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints.txt"
TOOLS = ("pip",)  # pinned too, though no package asks for it
# Only the CUDA builds of torch bring these; which ones, and in which version, is torch's own exact choice.
PLATFORM = re.compile(r"(nvidia|cuda|triton)(-|$)")
# Extras that `make setup` leaves out for their size, and what each brings. Their pins stay while they are not here.
APART = {"nixl": ("nixl", "nixl-cu12", "nixl-cu13")}
HEADER = """\
# The exact versions that Baton is built, tested and released with: runtime, extras, development and build.
# pyproject.toml has the ranges. Written by `make pins`; how to move a pin: scripts/pins.py.
"""


def declared() -> list[str]:
    """Every requirement that pyproject.toml writes down."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [
        project["project"]["dependencies"],
        *(wanted for extra, wanted in _extras(project).items() if extra not in APART or _installed(APART[extra][0])),
        *project["dependency-groups"].values(),
        project["build-system"]["requires"],
    ]
    return [requirement for group in groups for requirement in group]


def _extras(project: dict[str, Any]) -> dict[str, list[str]]:
    extras: dict[str, list[str]] = project["project"].get("optional-dependencies", {})
    return extras


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _absent() -> set[str]:
    """The packages of extras that are not installed here."""
    return {name for names in APART.values() if not _installed(names[0]) for name in names}


def resolved(requirements: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Versions by canonical name of all that `requirements` reach here, and what they want that is missing."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "pyproject.toml", "") for text in requirements]
    while todo:
        requirement, wanted_by, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            missing.append(f"{name}: not installed, wanted by {wanted_by}")
            continue
        versions[name] = found.version.partition("+")[0]  # "+cpu" names a build of the version, not another one
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(text), name, wanted) for text in found.requires or []]
    return versions, missing


def pinned() -> dict[str, str]:
    """Versions by canonical name in constraints.txt; raises ValueError for a line that is no exact pin."""
    pins: dict[str, str] = {}
    for line in PINS.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", text)
        if match is None:
            raise ValueError(f"constraints.txt: not an exact pin: {line!r}")
        pins[canonicalize_name(match[1])] = match[2]
    return pins


def drift(pins: dict[str, str], versions: dict[str, str]) -> list[str]:
    """One line for each package that is unpinned, pinned to another version, or pinned for nobody."""
    wanted = {name: version for name, version in versions.items() if not PLATFORM.match(name)}
    unpinned = [f"{name}: {wanted[name]} is not pinned" for name in wanted.keys() - pins.keys()]
    other = [f"{n}: {wanted[n]} here, pinned {pins[n]}" for n in wanted.keys() & pins.keys() if wanted[n] != pins[n]]
    unused = [
        f"{name}: pinned, but nothing reaches it" for name in pins.keys() - wanted.keys() - set(TOOLS) - _absent()
    ]
    return sorted(unpinned + other + unused)


def main(check: bool) -> None:
    versions, problems = resolved(declared())
    if problems:
        sys.exit("\n".join(sorted(problems)))
    if check:
        problems = drift(pinned(), versions)
        if problems:
            sys.exit(
                "\n".join([*problems, "constraints.txt does not match this environment: `make setup` or `make pins`"])
            )
        return
    tools = {name: distribution(name).version for name in TOOLS}
    kept = {name: version for name, version in pinned().items() if name in _absent()}
    lines = {name: version for name, version in (tools | kept | versions).items() if not PLATFORM.match(name)}
    PINS.write_text(HEADER + "".join(f"{name}=={lines[name]}\n" for name in sorted(lines)))


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
