"""The peers on the same cases, each in its own environment and process: vLLM and llama.cpp as `setup.sh DIR` made them.

A peer's script prints one JSON line per case. It is given as text, so that it needs nothing of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

VLLM = """
import json, os, random, sys, time
os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND=sys.argv[2])
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    begin = time.perf_counter()
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=8192, enable_prefix_caching=False, disable_log_stats=True)
    print(json.dumps({"case": "ready", "value": time.perf_counter() - begin}), flush=True)
    def run(count, prompt, output):
        prompts = [{"prompt_token_ids": [random.randrange(1000, 40000) for _ in range(prompt)]} for _ in range(count)]
        begin = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True, temperature=0), use_tqdm=False)
        return time.perf_counter() - begin
    run(1, 32, 4)
    for line in sys.stdin:
        name, tokens, sequences = json.loads(line)
        if sequences:
            value = sequences * 32 / (run(sequences, tokens, 36) - run(sequences, tokens, 4))
        else:
            value = tokens / run(1, tokens, 1)
        print(json.dumps({"case": name, "value": value}), flush=True)
"""
LLAMA = """
import json, sys, time
import xllamacpp
begin = time.perf_counter()
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 8192, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(json.dumps({"case": "ready", "value": time.perf_counter() - begin}), flush=True)
def run(words, output):
    prompt = " ".join(f"word{i * 7919 % 1000}" for i in range(words))
    reply = server.handle_completions(
        {"prompt": prompt, "n_predict": output, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    )
    return (json.loads(reply) if isinstance(reply, (bytes, str)) else reply)["timings"]
run(10, 4)
for line in sys.stdin:
    name, tokens, sequences = json.loads(line)
    if sequences > 1:
        value = None
    elif sequences:
        value = 1e3 / run(tokens // 4, 64)["predicted_per_token_ms"]
    else:
        value = run(tokens // 4, 1)["prompt_per_second"]
    print(json.dumps({"case": name, "value": value}), flush=True)
"""


class Peer:
    """A running peer, asked case by case so that its runs lie between ours."""

    def __init__(self, name: str, python: Path, script: str, arguments: list[str], cpu: int) -> None:
        """Starts it, pinned to `cpu`; seconds to minutes. RuntimeError when it ends instead of getting ready."""
        self.name = name
        self._process = subprocess.Popen(
            ["taskset", "-c", str(cpu), str(python), "-c", script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.ready_s = self._answer("ready") or 0.0

    def ask(self, name: str, tokens: int, sequences: int) -> float | None:
        """Tokens per second of a case; None where the peer has no such case."""
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.write(json.dumps([name, tokens, sequences]) + "\n")
        self._process.stdin.flush()
        return self._answer(name)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, name: str) -> float | None:
        assert self._process.stdout is not None, "opened as a pipe"
        for line in self._process.stdout:
            if line.startswith('{"case"') and (found := json.loads(line))["case"] == name:
                return found["value"]  # type: ignore[no-any-return]
        raise RuntimeError(f"{self.name} ended before it answered {name!r}")


def start(folder: Path, cpu: int) -> list[Peer]:
    """The peers that `folder` holds."""
    (gguf,) = (folder / "model").glob("*.gguf")
    return [
        Peer("vllm", folder / "vllm/bin/python", VLLM, [str(folder / "model-hf"), str(cpu)], cpu),
        Peer("llama.cpp", folder / "llama/bin/python", LLAMA, [str(gguf)], cpu),
    ]
