"""SHA-256 of large files, cached until a file's size or modification time changes."""

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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256. Raises ModelFileError for a file that can't be read."""
    try:
        status = path.stat()
        identity = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        stamp = cache_dir() / "digests" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if (known := _read_stamp(stamp, identity)) is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    with contextlib.suppress(OSError):  # without the cache the next start only takes longer
        stamp.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=stamp.parent, delete=False) as temporary:
            json.dump({"file": identity, "sha256": digest}, temporary)
        Path(temporary.name).replace(stamp)
    return digest


def weights_digest(files: Sequence[Path]) -> str:
    """One checksum over the files' checksums, in this order."""
    return hashlib.sha256("".join(file_digest(path) for path in files).encode()).hexdigest()


def _read_stamp(stamp: Path, identity: str) -> str | None:
    try:
        entry = json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None  # missing or torn: hash again
    matches = isinstance(entry, dict) and entry.get("file") == identity
    return str(entry["sha256"]) if matches and "sha256" in entry else None
