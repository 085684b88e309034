"""Generate the gRPC stubs under baton/v1 from proto/, or tell how the committed ones differ from that.

python scripts/stubs.py           write them
python scripts/stubs.py --check   write nothing; exit 1 and name what differs
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = Path("baton/v1")
KINDS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Write the stubs of every file in proto/ below `out`."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("proto/**/*.proto"))
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # The mypy plugins are programs beside this interpreter; protoc looks for them in PATH.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, *sources]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"protoc failed:\n{ran.stderr.strip()}")


def read(base: Path) -> dict[str, str]:
    """The generated files in `base`/baton/v1 by name."""
    return {path.name: path.read_text() for kind in KINDS for path in (base / STUBS).glob(kind)}


def drift(committed: dict[str, str], fresh: dict[str, str]) -> list[str]:
    """One line for each file that is missing, stale or left over, with the first line that differs."""
    lines = [f"{STUBS / name}: comes from no .proto" for name in sorted(committed.keys() - fresh.keys())]
    for name in sorted(fresh):
        if name not in committed:
            lines.append(f"{STUBS / name}: missing")
        elif committed[name] != fresh[name]:
            changes = difflib.unified_diff(committed[name].splitlines(), fresh[name].splitlines(), n=0, lineterm="")
            first = next(line for line in changes if line[:2] not in ("--", "++", "@@"))
            lines.append(f"{STUBS / name}: stale: {first}")
    return lines


def main(check: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="baton-stubs-") as folder:
        generate(Path(folder))
        committed, fresh = read(ROOT), read(Path(folder))
    problems = drift(committed, fresh)
    if check:
        if problems:
            sys.exit("\n".join([*problems, "the stubs do not match proto/: run `make proto`"]))
        return
    for name in committed.keys() - fresh.keys():
        (ROOT / STUBS / name).unlink()
    for name, text in fresh.items():
        if committed.get(name) != text:
            (ROOT / STUBS / name).write_text(text)
    print(f"{len(problems)} of {len(fresh)} stubs written")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
