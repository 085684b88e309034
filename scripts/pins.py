"""Write constraints.txt from what this environment has, or tell where the two differ.

    python scripts/pins.py           write it
    python scripts/pins.py --check   write nothing; exit 1 and name what differs

Pinned is what pyproject.toml reaches (dependencies, extras, dev group, build system), followed through the installed
packages' own requirements. To move a pin: `.venv/bin/pip install -U NAME`, `make pins`, `make test`. The extras that
`make setup` leaves out are pinned by hand, at the end of the file; `make pins` keeps those lines.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints.txt"
TOOLS = ("pip",)  # pinned too, though no package asks for it
APART = ("cuda", "nixl")  # the extras that `make setup` leaves out
# Only the CUDA builds of torch bring these; which ones, and in which version, is torch's own exact choice.
PLATFORM = re.compile(r"(nvidia|cuda|triton)(-|$)")
HEADER = """\
# The exact versions that Baton is built, tested and released with: runtime, extras, development and build.
# pyproject.toml has the ranges. Written by `make pins`; how to move a pin: scripts/pins.py.
"""
APART_HEADER = """\
# The extras that `make setup` leaves out, with all that they need beside the above; written by hand.
"""


def declared(apart: Iterable[str] = ()) -> list[str]:
    """Every requirement that pyproject.toml writes down for `make setup`; or those of the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"].get("optional-dependencies", {})
    if apart:
        return [requirement for name in apart for requirement in extras[name]]
    groups = [
        project["project"]["dependencies"],
        *(requirements for name, requirements in extras.items() if name not in APART),
        *project["dependency-groups"].values(),
        project["build-system"]["requires"],
    ]
    return [requirement for group in groups for requirement in group]


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


def pinned(apart: bool = False) -> dict[str, str]:
    """Versions by canonical name in constraints.txt, of what `make setup` installs or of what it leaves out; raises
    ValueError for a line that is no exact pin."""
    pins: dict[str, str] = {}
    for line in PINS.read_text().partition(APART_HEADER)[2 if apart else 0].splitlines():
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
    unused = [f"{name}: pinned, but nothing reaches it" for name in pins.keys() - wanted.keys() - set(TOOLS)]
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
    lines = {name: version for name, version in (tools | versions).items() if not PLATFORM.match(name)}
    apart = "".join(PINS.read_text().partition(APART_HEADER)[1:])
    PINS.write_text(HEADER + "".join(f"{name}=={lines[name]}\n" for name in sorted(lines)) + apart)


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
