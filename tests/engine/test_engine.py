"""The engine as schedulers use it: its pool, its step, and whole prompts run offline."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from baton.engine.api import Engine, Sequence, Work
from baton.engine.files.card import ModelDescription
from baton.engine.files.models import ResolvedModel
from baton.engine.kv import make_pool
from baton.engine.offline import GenerationResult, OfflinePrompt, generate
from baton.engine.torch.engine import TorchEngine, resolve_device
from baton.errors import ConfigError, InvalidArgument, ResourceExhausted
from baton.model import KvLayout
from baton.spec import Sampling
from tests.engine.conftest import Computing, Tiny, tokens_for


def prompts(count: int, sampling: Sampling) -> list[OfflinePrompt]:
    return [OfflinePrompt(tuple(tokens_for(5 + 13 * index, index)), sampling, 4 + index) for index in range(count)]


def test_generation_does_not_depend_on_batch_or_chunking(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    engine = computing.engine(tiny("llama"))
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0, seed=3, repetition_penalty=1.2)):
        wanted = prompts(6, sampling)
        alone = [generate(engine, [prompt], blocks=64)[0].tokens for prompt in wanted]
        for chunk, at_once, blocks in ((1, 6, 64), (7, 3, 64), (64, 6, 10), (500, 16, 64)):
            batched = generate(engine, wanted, blocks=blocks, chunk_tokens=chunk, max_sequences=at_once)
            assert [completion.tokens for completion in batched] == alone
            assert [len(completion.tokens) for completion in batched] == [4, 5, 6, 7, 8, 9]


def test_greedy_generation_matches_the_reference(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("qwen3")
    (prompt,) = [OfflinePrompt(tuple(tokens_for(21)), max_tokens=12)]
    found = generate(computing.engine(model), [prompt], blocks=64)[0].tokens
    tokens = list(prompt.tokens)
    for token in found:
        logits = model.logits(tokens)[-1]
        assert logits.max() - logits[token] <= computing.error * logits.std(), "its best, or as good as"
        tokens.append(token)


def test_the_embedded_model_answers(
    computing: Computing, embedded: ResolvedModel, embedded_engine: TorchEngine
) -> None:
    from tokenizers import Tokenizer

    engine = embedded_engine if computing.kernels == "torch" else computing.engine(embedded, blocks=8)
    tokenizer = Tokenizer.from_str(engine.description.card.tokenizer_json.decode())
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    stop = frozenset(engine.description.card.eos_token_ids)
    prompt = OfflinePrompt(tuple(tokenizer.encode(text).ids), max_tokens=30, stop_token_ids=stop)
    (completion,) = generate(engine, [prompt], blocks=8)
    assert completion.stopped
    assert tokenizer.decode(completion.tokens) == "The capital of France is Paris."


def test_stop_ids_end_a_prompt_and_are_kept(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    engine = computing.engine(tiny("llama"))
    tokens = tuple(tokens_for(9))
    free = generate(engine, [OfflinePrompt(tokens, max_tokens=8)], blocks=8)[0]
    assert not free.stopped
    stop = frozenset({free.tokens[2]})
    stopped = generate(engine, [OfflinePrompt(tokens, max_tokens=8, stop_token_ids=stop)], blocks=8)[0]
    assert stopped.stopped
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


def test_timing_and_logprobs_are_reported(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama")
    tokens = tokens_for(30)
    prompt = OfflinePrompt(tuple(tokens), Sampling(temperature=0.7, seed=5, logprobs=2), max_tokens=5)
    completion: GenerationResult = generate(computing.engine(model), [prompt], blocks=8, chunk_tokens=8)[0]
    assert completion.prefill_s > 0
    assert len(completion.step_s) == 4
    assert len(completion.logprobs) == 5
    expected = model.logits(tokens)[-1].log_softmax(-1)
    near = computing.error * float(expected.std())
    assert completion.logprobs[0].logprob == pytest.approx(expected[completion.tokens[0]].item(), abs=near)
    assert expected[completion.logprobs[0].top[0][0]] >= expected.max() - near


def test_prompts_are_checked(tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(InvalidArgument, match="tokens"):
        OfflinePrompt(())
    with pytest.raises(InvalidArgument, match="max_tokens"):
        OfflinePrompt((1,), max_tokens=0)
    with pytest.raises(ResourceExhausted, match="needs 8 blocks, the pool has 4"):
        generate(tiny("llama").engine(), [OfflinePrompt(tuple(tokens_for(100)))], blocks=4)


def test_the_pool_lies_in_the_callers_memory(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    layout = computing.engine(tiny("llama"), blocks=1).layout
    memory = mmap.mmap(-1, 5 * layout.block_bytes)
    engine = computing.engine(tiny("llama"), buffer=memory)
    assert engine.pool.count == 5
    tokens = tokens_for(17)
    engine.step([Work(Sequence(bytes(16), tokens, 17, [3, 1], 0, Sampling()), 17)])
    width = {"float32": np.uint32, "bfloat16": np.uint16}[layout.dtype]
    stored = np.frombuffer(memory, width).reshape(5, *layout.shape)
    assert stored[3].any(axis=-1).all()
    assert stored[1][:, :, :, 0].any(axis=-1).all()
    assert not stored[1][:, :, :, 1:].any()
    assert not stored[[0, 2, 4]].any()


def test_kv_handed_over_as_bytes_serves_another_engine(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    first, second = computing.engine(tiny("qwen2")), computing.engine(tiny("qwen2"))
    tokens = tokens_for(37)
    sequence = Sequence(bytes(16), tokens, 37, [4, 9, 2], 0, Sampling())
    first.step([Work(sequence, 36)])
    second.pool.blocks[[7, 0, 5]] = first.pool.blocks[[4, 9, 2]]
    taken_over = Sequence(bytes(16), tokens, 37, [7, 0, 5], 36, Sampling())
    assert np.array_equal(second.logits([Work(taken_over, 1)])[0], first.logits([Work(sequence, 1)])[0])


def test_blocks_appended_later_are_used(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama")
    engine, tokens = computing.engine(model), tokens_for(33)
    sequence = Sequence(bytes(16), tokens, 33, [6], 0, Sampling())
    engine.step([Work(sequence, 16)])
    sequence.blocks += [2, 11]
    found = engine.logits([Work(sequence, 17)])[0]
    computing.assert_near([found], model.logits(tokens), [33])


def test_warm_up_leaves_the_engine_usable(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    engine: Engine = computing.engine(tiny("llama"))
    engine.warm_up()
    assert generate(engine, [OfflinePrompt((1, 2, 3))], blocks=4)[0].tokens


def test_our_own_mistakes_are_asserted(tiny: Callable[[str], Tiny]) -> None:
    engine = tiny("llama").engine()
    with pytest.raises(AssertionError, match="computes something"):
        engine.step([])
    with pytest.raises(AssertionError, match="known tokens"):
        engine.step([Work(Sequence(bytes(16), [1, 2], 2, [0], 0, Sampling()), 3)])
    with pytest.raises(AssertionError, match="blocks cover"):
        engine.step([Work(Sequence(bytes(16), [1] * 17, 17, [0], 0, Sampling()), 17)])
    layout = KvLayout(1, 1, 2, "float32")
    with pytest.raises(AssertionError, match="writable"):
        make_pool(layout, memoryview(bytes(layout.block_bytes)), None)


@pytest.mark.parametrize(("name", "cause"), [("tpu", "must be cpu or cuda"), ("meta", "must be cpu or cuda")])
def test_an_unknown_device_is_refused_by_name(name: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_one_line(tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        TorchEngine.load(tiny("llama").describe(), device="cuda", blocks=4)
    assert "\n" not in str(caught.value)


def test_the_card_side_never_imports_torch() -> None:
    code = "import sys, baton.engine.files.card, baton.engine.files.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_descriptions_are_plain_values(tiny: Callable[[str], Tiny]) -> None:
    first, second = tiny("llama").describe(), tiny("llama").describe()
    assert isinstance(first, ModelDescription)
    assert first == second
