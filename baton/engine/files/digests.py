"""SHA-256 of large files, remembered: a file is hashed in full once, and again when its size or time changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from baton.errors import ModelFileError


def cache_dir() -> Path:
    """`$BATON_CACHE`, else `$XDG_CACHE_HOME/baton`, else `~/.cache/baton`."""
    if own := os.environ.get("BATON_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "baton"
    return Path.home() / ".cache" / "baton"


def file_digest(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal; ModelFileError when it can't be read."""
    try:
        identity = _identity(path)
        stamp = cache_dir() / "digests" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        known = _read_stamp(stamp, identity)
        if known is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    with contextlib.suppress(OSError):  # a cache that can't be written only costs time at the next start
        _write_stamp(stamp, identity, digest)
    return digest


def weights_digest(files: Sequence[Path]) -> str:
    """One checksum over the files' checksums, in the order given."""
    return hashlib.sha256("".join(file_digest(path) for path in files).encode()).hexdigest()


def _identity(path: Path) -> str:
    real = path.resolve()
    status = real.stat()
    return f"{real}:{status.st_size}:{status.st_mtime_ns}"


def _read_stamp(stamp: Path, identity: str) -> str | None:
    try:
        entry = json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None  # none yet, or torn: hash again
    matches = isinstance(entry, dict) and entry.get("file") == identity
    return str(entry["sha256"]) if matches and "sha256" in entry else None


def _write_stamp(stamp: Path, identity: str, digest: str) -> None:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=stamp.parent, delete=False) as file:
        json.dump({"file": identity, "sha256": digest}, file)
    Path(file.name).replace(stamp)
