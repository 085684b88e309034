"""The limits of one core: memory read bandwidth, and the peak rate of the kernels' instructions."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from baton.engine.files.config import ModelConfig
from baton.engine.native.build import SOURCES, find_compiler, target_for
from baton.engine.native.engine import NativeEngine
from baton.engine.processor import cpu_flags
from benchmarks.compute.cases import Case


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured, in GB/s and giga-operations per second."""

    read_gb_s: float
    bf16_gop_s: float
    int8_gop_s: float

    def or_better(self, other: Limits) -> Limits:
        """The greater of each: other work lowers a measured limit."""
        return Limits(
            max(self.read_gb_s, other.read_gb_s),
            max(self.bf16_gop_s, other.bf16_gop_s),
            max(self.int8_gop_s, other.int8_gop_s),
        )

    def seconds(self, engine: NativeEngine, case: Case, uses_bytes: bool) -> float:
        """The least time of a case: its operations at peak rate or its bytes at full bandwidth."""
        config = engine.description.config
        products = self.int8_gop_s if uses_bytes else self.bf16_gop_s
        rows = case.tokens if case.is_prefill else case.sequences
        seen = case.tokens / 2 if case.is_prefill else case.tokens  # keys of a row, on average
        heads = 2 if case.is_prefill else 2 * case.sequences  # operations of the head: one row samples in prefill
        linear = 2 * rows * _layer_weights(config) + heads * config.hidden * config.vocabulary
        attention = 4 * rows * seen * config.heads * config.head_dim * config.layers
        computing = linear / products / 1e9 + attention / self.bf16_gop_s / 1e9
        kv = 0 if case.is_prefill else rows * seen * engine.layout.token_bytes
        return max(computing, (engine.model.weight_bytes + kv) / self.read_gb_s / 1e9)


def _layer_weights(config: ModelConfig) -> int:
    per_layer = config.hidden * (2 * (config.heads + config.kv_heads) * config.head_dim + 3 * config.mlp)
    return config.layers * per_layer


def measure() -> Limits:
    """Compiles and runs the measurement, which takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        source = str(Path(__file__).with_suffix(".cpp"))
        flags = ("-std=c++17", "-O3", "-Wno-psabi", f"-I{SOURCES}", *target_for(cpu_flags()).flags)
        subprocess.run([find_compiler(), *flags, source, "-o", program], check=True)
        return Limits(**json.loads(subprocess.run([program], check=True, capture_output=True).stdout))
