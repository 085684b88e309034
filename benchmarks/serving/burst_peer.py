"""vLLM under the same burst, with chunked prefill, in its own environment and process.

Steps its engine in a loop, without a server: a token's time is the end of its step.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.compute.peers import end_session

SCRIPT = """
import json, os, random, sys, time
os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND=sys.argv[2], HF_HUB_OFFLINE="1",
                  VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
from vllm import EngineArgs, LLMEngine, SamplingParams
if __name__ == "__main__":
    engine = LLMEngine.from_engine_args(EngineArgs(
        model=sys.argv[1], dtype="bfloat16", max_model_len=8192, enable_prefix_caching=False, disable_log_stats=True,
        enable_chunked_prefill=True))
    serial = 0
    def add(prompt, output):
        global serial
        serial += 1
        ids = [random.randrange(1000, 40000) for _ in range(prompt)]
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0)
        engine.add_request(str(serial), {"prompt_token_ids": ids}, params)
        return str(serial)
    def run(streams, burst, settled):
        stamps, seen, arrival = {}, {}, None
        names = [add(64, streams[1]) for _ in range(streams[0])]
        begin, firsts = time.perf_counter(), []
        while engine.has_unfinished_requests():
            if arrival is None and time.perf_counter() - begin >= settled:
                arrival = time.perf_counter()
                firsts = [add(1000, 8) for _ in range(burst)]
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                if count > seen.get(output.request_id, 0):
                    seen[output.request_id] = count
                    stamps.setdefault(output.request_id, []).append(now)
        arrival = arrival or begin + settled
        gaps = [(b - arrival, b - a) for name in names for a, b in zip(stamps[name], stamps[name][1:])]
        return gaps, [stamps[name][0] - arrival for name in firsts], time.perf_counter() - begin
    run((8, 8), 0, 1e9)
    one = run((8, 64), 0, 1e9)
    step = sorted(gap for _, gap in one[0])[len(one[0]) // 2]
    _, firsts, _ = run((1, 4), 1, 0.0)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        tokens = int((2.0 + 8 * firsts[0] * 1.4) / step)
        calm, _, _ = run((8, tokens), 0, 2.0)
        loaded, first, _ = run((8, tokens), 8, 2.0)
        print(json.dumps({"calm": calm, "loaded": loaded, "firsts": first}), flush=True)
"""
Gaps = list[tuple[float, float]]


class VllmBurst:
    """A running vLLM on all cores of this process; takes minutes to start."""

    name = "vllm"

    def __init__(self, folder: Path) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        command = [str(folder / "vllm/bin/python"), "-c", SCRIPT, str(folder / "model-hf"), cores]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._answer("ready")

    def round(self) -> tuple[Gaps, Gaps, list[float]]:
        """(time, gap) of the streams' tokens without and with the burst, and the burst's first tokens."""
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._answer("firsts")
        return [(at, gap) for at, gap in found["calm"]], [(at, gap) for at, gap in found["loaded"]], found["firsts"]

    def close(self) -> None:
        end_session(self._process)

    def _answer(self, key: str) -> dict[str, Any]:
        assert self._process.stdout is not None, "opened as a pipe"
        for line in self._process.stdout:
            if line.startswith("{") and key in (found := json.loads(line)):
                return found  # type: ignore[no-any-return]
        raise RuntimeError("vLLM ended before it answered")
