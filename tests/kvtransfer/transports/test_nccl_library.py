"""The real NCCL library: all that works without a GPU, and the order of the calls that need one. On a GPU:
`test_nccl_gpu.py`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from baton.config import WorkerConfig
from baton.errors import ConfigError
from baton.launch.transports import check_device
from kvtransfer.transports.nccl import library as nccl_library
from kvtransfer.transports.nccl.library import NcclCommunicator, NcclDevice
from kvtransfer.transports.nccl.seam import RECEIVER, SENDER, CommunicatorError, Span
from tests.test_project import script

ROOT = Path(__file__).parents[3]
INSTALLED = find_spec("nccl") is not None
needs_library = pytest.mark.skipif(not INSTALLED, reason="needs the extra [cuda], which make test-nccl installs")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: each unique id leaves a thread and a socket behind."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def has_device() -> bool:
    try:
        NcclDevice()
    except ConfigError:
        return False
    return True


@needs_library
def test_version_and_unique_id_work_without_a_gpu() -> None:
    program = (
        "from kvtransfer.transports.nccl.library import mint, version;"
        "print(version() >= (2, 30, 0), len(mint()), mint() != mint())"
    )
    ran = run("-c", program)
    assert (ran.returncode, ran.stdout.split()) == (0, ["True", "128", "True"]), ran.stderr


@needs_library
@pytest.mark.skipif(has_device(), reason="there is a GPU")
def test_an_initialisation_without_a_gpu_fails_at_once() -> None:
    program = (
        "from nccl.bindings import nccl\n"
        "config = nccl.Config()\n"
        "config.blocking = 0\n"
        "try:\n"
        "    nccl.comm_init_rank_config(2, nccl.get_unique_id(), 0, config)\n"
        "except nccl.NCCLError as error:\n"
        "    print(error)\n"
    )
    ran = run("-c", program)
    assert ran.returncode == 0, ran.stderr
    assert "cuda error" in ran.stdout


@pytest.mark.skipif(has_device(), reason="there is a GPU")
def test_a_worker_that_can_not_use_nccl_ends_at_once_with_one_line() -> None:
    ran = run("-m", "baton.cli", "decode", "--transport", "nccl")
    why = (
        "needs a CUDA device: " if INSTALLED else "needs nccl4py, nvidia-nccl-cu12 and cuda-python, the extra [cuda]: "
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"baton: transport nccl: {why}")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("transport", "device", "why"),
    [
        ("nccl", "auto", "moves CUDA memory, and with device auto the pool is in CPU memory"),
        ("shm", "cuda", "moves CPU memory, and with device cuda the pool is in CUDA memory"),
        ("tcp", "cuda:1", "moves CPU memory, and with device cuda:1 the pool is in CUDA memory"),
        ("auto", "cuda", ""),
        ("nccl", "cuda:1", ""),
        ("auto", "auto", ""),
        ("tcp", "cpu", ""),
    ],
)
def test_where_there_is_a_gpu_the_transport_must_fit_the_pool(
    monkeypatch: pytest.MonkeyPatch, transport: Any, device: str, why: str
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("baton.launch.transports.NcclDevice", asked.append)
    config = WorkerConfig(roles=frozenset({"decode"}), transport=transport, device=device)
    if why:
        with pytest.raises(ConfigError, match=why):
            check_device(config)
    else:
        check_device(config)
    assert asked == ([int(device[5:] or 0)] if device.startswith("cuda") else [0] if transport == "nccl" else [])


@pytest.mark.parametrize(("field", "value"), [("kernels", "native"), ("weights", "int4"), ("weights", "int8")])
def test_what_computes_on_the_cpu_only_is_refused_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    monkeypatch.setattr("baton.launch.transports.NcclDevice", lambda _index: None)
    config = replace(WorkerConfig(roles=frozenset({"decode"}), device="cuda"), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{field} {value}: the native kernels compute on the CPU"):
        check_device(config)


@needs_library
def test_all_that_the_extra_installs_is_pinned() -> None:
    pins = script("pins")
    versions, missing = pins.resolved(pins.declared(["cuda"]))
    assert missing == []
    known = pins.pinned() | pins.pinned(apart=True)
    assert {name: known.get(name) for name in versions} == versions
    assert {name for name in pins.pinned(apart=True) if not name.startswith("nixl")} <= versions.keys()


@needs_library
def test_every_function_that_is_called_exists() -> None:
    nccl, cuda = nccl_library._import()
    for name in ("comm_init_rank_config", "comm_get_async_error", "comm_abort", "group_start", "group_end", "send"):
        assert callable(getattr(nccl, name)), name
    for name in ("cudaStreamWaitEvent", "cudaEventRecord", "cudaEventQuery", "cudaStreamQuery", "cudaStreamDestroy"):
        assert callable(getattr(cuda, name)), name


class Libraries:
    """Stands for both libraries, whose communicators need a GPU: remembers the calls, and answers what it is told."""

    class NCCLError(Exception):
        pass

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.state = "InProgress"
        self.ready = True
        self.config = SimpleNamespace()
        self.fail = ""
        self.Result = SimpleNamespace(InProgress="InProgress", Success="Success")
        self.DataType = SimpleNamespace(Uint8=1)
        self.UniqueId = SimpleNamespace(from_buffer=bytes)
        self.cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorNotReady=600)
        self.cudaStreamNonBlocking, self.cudaEventDisableTiming = 1, 2

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> Any:
            self.calls.append(name)
            if name == self.fail:
                raise self.NCCLError(f"{name} failed")
            answers: dict[str, Any] = {
                "Config": self.config,
                "comm_get_async_error": self.state if self.state in ("InProgress", "Success") else 6,
                "cudaStreamCreateWithFlags": (0, 17),
                "cudaEventCreateWithFlags": (0, 18),
                "cudaEventQuery": (0 if self.ready else 600,),
                "cudaStreamQuery": (0 if self.ready else 600,),
                "get_error_string": self.state,
                "get_last_error": "ncclRemoteError",
                "cudaEvent_t": arguments,
            }
            return answers.get(name, (0,))

        return call

    def made(self, rank: int) -> NcclCommunicator:
        communicator = NcclCommunicator(self, self, bytes(128), rank)  # type: ignore[arg-type]
        self.calls.clear()
        return communicator


def test_communicators_are_non_blocking_and_open_when_both_ranks_have_come() -> None:
    libraries = Libraries()
    communicator = libraries.made(RECEIVER)
    assert (libraries.config.blocking, libraries.config.max_ctas) == (0, 8)
    assert not communicator.poll()
    libraries.state = "Success"
    assert communicator.poll()


@pytest.mark.parametrize(("rank", "move"), [(RECEIVER, "recv"), (SENDER, "send")])
def test_a_group_waits_for_the_fence_and_its_event_follows_the_launch(rank: int, move: str) -> None:
    libraries = Libraries()
    communicator = libraries.made(rank)
    communicator.post([Span(4096, 16), Span(8192, 32)], SimpleNamespace(cuda_event=5))
    assert libraries.calls == ["cudaEvent_t", "cudaStreamWaitEvent", "group_start", move, move, "group_end"]
    assert not communicator.poll()
    assert "cudaEventRecord" not in libraries.calls, "the launch is still in progress"
    libraries.state, libraries.ready = "Success", False
    assert not communicator.poll()
    assert not communicator.poll()
    assert libraries.calls.count("cudaEventRecord") == 1
    libraries.ready = True
    assert communicator.poll()


def test_errors_are_told_and_a_group_is_closed_after_one() -> None:
    libraries = Libraries()
    communicator = libraries.made(SENDER)
    libraries.fail = "send"
    with pytest.raises(CommunicatorError, match="send failed"):
        communicator.post([Span(4096, 16)], None)
    assert libraries.calls == ["group_start", "send", "group_end"]
    libraries.fail, libraries.state = "", "remote process exited"
    with pytest.raises(CommunicatorError, match="remote process exited: ncclRemoteError"):
        communicator.poll()


def test_it_is_drained_only_when_the_stream_is() -> None:
    libraries = Libraries()
    communicator = libraries.made(RECEIVER)
    libraries.ready = False
    communicator.abort()
    assert not communicator.drained()
    libraries.ready = True
    assert communicator.drained()
    assert libraries.calls == [
        "comm_abort", "cudaStreamQuery", "cudaStreamQuery", "cudaEventDestroy", "cudaStreamDestroy",
    ]  # fmt: skip
