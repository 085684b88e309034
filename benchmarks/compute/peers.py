"""Runs the peers on the same cases, each in its own environment and process: vLLM and llama.cpp of `setup.sh DIR`.

A peer's script prints one JSON line per case. It is a text, so that it imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

VLLM = """
import json, os, random, sys, time
os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND=sys.argv[2])
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    begin = time.perf_counter()
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=8192, enable_prefix_caching=False, disable_log_stats=True)
    print(json.dumps({"case": "ready", "value": time.perf_counter() - begin}), flush=True)
    import vllm
    print(json.dumps({"case": "about", "value": vllm.__version__ + ", bfloat16"}), flush=True)
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
about = xllamacpp.get_system_info().strip(" |") + "; " + xllamacpp.BUILD_INFO["compiler"]
print(json.dumps({"case": "about", "value": about}), flush=True)
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

# Prebuilt libraries that pick code for the processor, over llama.cpp's C interface. Structures of parameters change
# between versions: the library fills them, they are passed on whole, and only their stable first field is set.
LLAMA_NATIVE = """
import ctypes, glob, json, os, sys, time
folder, gguf = sys.argv[1:]
begin = time.perf_counter()
ggml, llama = (
    [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sorted(glob.glob(os.path.join(folder, pattern)))][-1]
    for pattern in ("libggml[-.][bv]*.so", "libllama.v*.so")
)
class Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * 128)]
class Batch(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), *((name, ctypes.c_void_p) for name in "tepnsl")]
def call(library, name, result, *types):
    function = getattr(library, name)
    function.restype, function.argtypes = result, types
    return function
def default(name):
    found = Parameters()
    call(llama, name, ctypes.c_void_p, ctypes.c_void_p)(ctypes.addressof(found))
    return found
pointer = ctypes.c_void_p
call(ggml, "ggml_backend_load_all_from_path", None, ctypes.c_char_p)(folder.encode())
load = call(llama, "llama_model_load_from_file", pointer, ctypes.c_char_p, Parameters)
model = load(gguf.encode(), default("llama_model_default_params"))
options = default("llama_context_default_params")
options.words[0] = 8192
context = call(llama, "llama_init_from_model", pointer, pointer, Parameters)(model, options)
call(llama, "llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32)(context, 1, 1)
decode = call(llama, "llama_decode", ctypes.c_int32, pointer, Batch)
memory = call(llama, "llama_get_memory", pointer, pointer)(context)
clear = call(llama, "llama_memory_clear", None, pointer, ctypes.c_bool)
logits = call(llama, "llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32)
def step(tokens):
    for start in range(0, len(tokens), 512):
        piece = (ctypes.c_int32 * 512)(*tokens[start : start + 512])
        count = min(512, len(tokens) - start)
        assert decode(context, Batch(count, ctypes.addressof(piece))) == 0
    logits(context, -1)[0]
def timed(tokens):
    begin = time.perf_counter()
    step(tokens)
    return time.perf_counter() - begin
def prompt(count):
    clear(memory, True)
    return [i * 7919 % 40000 + 1000 for i in range(count)]
step(prompt(16))
print(json.dumps({"case": "ready", "value": time.perf_counter() - begin}), flush=True)
about = call(llama, "llama_print_system_info", ctypes.c_char_p)().decode().strip(" |")
print(json.dumps({"case": "about", "value": about}), flush=True)
for line in sys.stdin:
    name, tokens, sequences = json.loads(line)
    if sequences > 1:
        value = None
    elif sequences:
        step(prompt(tokens))
        value = 64 / sum(timed([1000 + i]) for i in range(64))
    else:
        value = tokens / timed(prompt(tokens))
    print(json.dumps({"case": name, "value": value}), flush=True)
"""
NAMES = ("vllm", "llama.cpp", "llama.cpp native")


def end_session(leader: subprocess.Popen[str]) -> None:
    """Kills the process and its whole session, of which it is the leader: vLLM's engine outlives its parent."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


class Peer:
    """A running peer, asked case by case to interleave its runs with ours."""

    def __init__(self, name: str, python: Path, script: str, arguments: list[str], cpu: int) -> None:
        """Starts it, pinned to `cpu`; takes seconds to minutes. Raises RuntimeError if it ends before it is ready."""
        self.name = name
        self._process = subprocess.Popen(
            ["taskset", "-c", str(cpu), str(python), "-c", script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        self.ready_s = float(self._answer("ready"))
        self.about = str(self._answer("about"))
        """Its version and compilation target."""

    def ask(self, name: str, tokens: int, sequences: int) -> float | None:
        """Tokens per second of a case; None if the peer can't run it."""
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.write(json.dumps([name, tokens, sequences]) + "\n")
        self._process.stdin.flush()
        rate = self._answer(name)
        return None if rate is None else float(rate)

    def close(self) -> None:
        end_session(self._process)

    def _answer(self, name: str) -> Any:
        assert self._process.stdout is not None, "opened as a pipe"
        for line in self._process.stdout:
            if line.startswith('{"case"') and (found := json.loads(line))["case"] == name:
                return found["value"]
        raise RuntimeError(f"{self.name} ended before it answered {name!r}")


def start(folder: Path, cpu: int, chosen: list[str]) -> list[Peer]:
    """Starts the chosen peers that `folder` has."""
    (gguf,) = (folder / "model").glob("*.gguf")
    native = folder / "llama-native"
    known = {
        "vllm": (folder / "vllm", VLLM, [str(folder / "model-hf"), str(cpu)]),
        "llama.cpp": (folder / "llama", LLAMA, [str(gguf)]),
        "llama.cpp native": (native, LLAMA_NATIVE, [str(native), str(gguf)]),
    }
    return [
        Peer(name, home / "bin/python" if (home / "bin").exists() else Path(sys.executable), script, arguments, cpu)
        for name, (home, script, arguments) in known.items()
        if name in chosen and home.exists()
    ]
