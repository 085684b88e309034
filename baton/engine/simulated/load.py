"""The simulated engine from a worker's settings. Imports no torch: a worker that computes nothing starts at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from baton.config import WorkerConfig
from baton.cost import StepCost, StepShape, pairs
from baton.engine.files.card import ModelCard, describe
from baton.engine.files.models import resolve
from baton.engine.simulated.cost import faster, read_costs
from baton.engine.simulated.engine import SimulatedEngine
from kvtransfer.blocks.layout import KvLayout

BYTES_MODEL = "bytes"
"""A tokeniser without a model: each byte is a token. It needs no file."""
BYTES_CONTEXT = 131_072
PREFIX = "simulated/"
"""Before a simulated model's name, wherever it is seen: nobody takes it for the model."""
_END = "<|end|>"


def simulated_card(config: WorkerConfig) -> ModelCard:
    """The model's own card under another name and fingerprint, so that it pairs with no worker that computes."""
    if config.model == BYTES_MODEL:
        real = bytes_card()
    else:
        real = describe(resolve(config.model), config.dtype, "cpu", config.kv_dtype).card
    layout = real.kv_layout
    if config.sim_kv_bytes_per_token:
        layout = KvLayout(layers=1, kv_heads=1, head_dim=config.sim_kv_bytes_per_token // 4, dtype="bfloat16")
    parts = json.dumps({"simulated": real.fingerprint, "layout": asdict(layout)}, sort_keys=True)
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    return replace(real, name=PREFIX + real.name, fingerprint=fingerprint, kv_layout=layout, simulated=True)


def simulated_engine(config: WorkerConfig, card: ModelCard, buffer: memoryview) -> SimulatedEngine:
    """Over the pool's memory. Raises ConfigError for a cost model that can't be read."""
    return SimulatedEngine(card, buffer, faster(read_costs(config.cost_model), config.sim_speed), config.sim_eos_after)


def typical_steps(costs: StepCost) -> tuple[tuple[StepShape, float], ...]:
    """What a measurement at the start would find, without waiting for it."""
    chunks = [StepShape(new, pairs(new, cached)) for new in (16, 128) for cached in (0, 1024)]
    steps = [StepShape(0, 0.0, count, count * tokens) for count in (1, 8) for tokens in (32, 256)]
    return tuple((shape, costs.seconds(shape)) for shape in (*chunks, *steps))


@cache
def bytes_card() -> ModelCard:
    """A card with a tokeniser of 256 bytes and one special token, which ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(_END, special=True)])
    text = made.to_str()
    return ModelCard(
        name=BYTES_MODEL,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        context_tokens=BYTES_CONTEXT,
        vocabulary_size=made.get_vocab_size(),
        eos_token_ids=(len(alphabet),),
        bos_token_id=None,
        bos_token="",
        eos_token=_END,
        tokenizer_json=text.encode(),
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        kv_layout=KvLayout(layers=1, kv_heads=1, head_dim=16, dtype="bfloat16"),
    )
