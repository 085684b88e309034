"""Compiles the kernels once per kind of processor, for exactly its instructions, and caches the library."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import structlog

from baton.engine.files.digests import cache_dir
from baton.errors import BatonError

log = structlog.get_logger(__name__)

SOURCES = Path(__file__).parent
COMPILE_LIMIT_S = 120.0
# Without contraction only the source decides on fused rounding, so that every instance of a kernel gives the same bits.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")


class NativeUnavailable(BatonError):
    """The kernels can't be compiled or can't serve a model; the message gives the reason, in one line."""


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """A name for logs and fingerprints, and the compiler's flags."""

    name: str
    flags: tuple[str, ...]


def target_for(features: frozenset[str]) -> BuildTarget:
    """The best target for these features. Raises NativeUnavailable below AVX2 with FMA."""
    if not {"avx2", "fma", "f16c"} <= features:
        raise NativeUnavailable("the processor has no AVX2 with FMA")
    if not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features:
        return BuildTarget("avx2", _AVX2)
    name = "avx512"
    flags: tuple[str, ...] = _AVX2 + _AVX512
    for feature, flag in (("avx512_vnni", "-mavx512vnni"), ("avx512_bf16", "-mavx512bf16")):
        if feature in features:
            name, flags = f"{name}+{feature.removeprefix('avx512_')}", (*flags, flag)
    return BuildTarget(name, flags)


@cache
def library_for(target: BuildTarget) -> Path:
    """The library, compiled (seconds) unless cached. Raises NativeUnavailable."""
    folder = cache_dir() / "native"
    path = folder / f"{_key(target)}.so"
    if path.exists():
        return path
    compiler = find_compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            try:  # processes that start together compile once
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for the kernels that another process compiles")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                log.info("compiling the kernels, once", target=target.name, into=str(folder))
                _compile(compiler, target, path)
    except OSError as error:
        raise NativeUnavailable(f"the kernels can't be kept in {folder}: {error.strerror or error}") from None
    return path


def arithmetic_of(target: BuildTarget) -> dict[str, str]:
    """The facts that decide on the kernels' bits: their sources, the instructions, the mathematical library."""
    libc = "-".join(platform.libc_ver()) or platform.system()
    return {"kernels": f"native-{_key(target).rpartition('-')[2][:12]}", "instructions": target.name, "libm": libc}


def find_compiler() -> str:
    """`$CXX` or the first C++ compiler in the path. Raises NativeUnavailable without one."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeUnavailable("there is no C++ compiler (g++, c++, clang++ or $CXX)")


def _key(target: BuildTarget) -> str:
    digest = hashlib.sha256("\0".join((*_FLAGS, *target.flags)).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{target.name}-{digest.hexdigest()[:32]}"


def _compile(compiler: str, target: BuildTarget, path: Path) -> None:
    sources = sorted(SOURCES.glob("*.cpp"))
    flags = (*_FLAGS, *target.flags)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        pairs = zip(sources, objects, strict=True)
        commands = [[compiler, *flags, "-c", str(source), "-o", str(made)] for source, made in pairs]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(_run, commands))
        made = Path(scratch) / path.name
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NativeUnavailable(f"{command[0]} took more than {COMPILE_LIMIT_S:.0f} s") from None
    if done.returncode:
        cause = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise NativeUnavailable(f"{command[0]} can't compile the kernels: {cause}")
