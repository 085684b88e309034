"""Two processes with the real library on one GPU; over the double everywhere, which tests the program itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kvtransfer.transports.nccl_pair import SCENARIOS
from tests.kvtransfer.transports.test_nccl_library import INSTALLED, has_device

ROOT = Path(__file__).parents[3]


def run(kind: str, scenario: str) -> None:
    """`NCCL_MULTI_RANK_GPU_ENABLE`: NCCL 2.30 or newer lets two ranks share a GPU."""
    command = [sys.executable, "-m", "tests.kvtransfer.transports.nccl_pair", kind, scenario]
    env = os.environ | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"intact {scenario}\n"), ran.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not INSTALLED, reason="needs the extra [cuda], which make test-nccl installs")
@pytest.mark.skipif(not has_device(), reason="needs a CUDA device")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_on_one_gpu(scenario: str) -> None:
    run("nccl-cuda", scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_same_program_over_the_double(scenario: str) -> None:
    run("nccl", scenario)
