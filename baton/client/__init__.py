"""The Python SDK.

async with Client("127.0.0.1:9700") as client:
    async for event in client.generate("Once upon a time", max_tokens=40):
        if isinstance(event, Tokens):
            print(event.text, end="", flush=True)
"""

from baton.client.client import Client
from baton.client.reports import Load, ModelInfo, PoolStatus, ProcessStatus, WorkerInfo, WorkerList
from baton.client.types import (
    Accepted,
    Completion,
    Event,
    Finished,
    FinishReason,
    FormerAttempt,
    Message,
    OnDisconnect,
    Path,
    RequestOptions,
    SloOutcome,
    Timeline,
    Tokenization,
    Tokens,
    Usage,
    WhenUnmet,
)
from baton.spec import TokenLogprobs

__all__ = [
    "Client",
    "RequestOptions",
    "Message",
    "Event",
    "Accepted",
    "Tokens",
    "Finished",
    "Completion",
    "FinishReason",
    "Path",
    "Usage",
    "Timeline",
    "FormerAttempt",
    "SloOutcome",
    "TokenLogprobs",
    "Tokenization",
    "ModelInfo",
    "WorkerInfo",
    "WorkerList",
    "Load",
    "ProcessStatus",
    "PoolStatus",
    "OnDisconnect",
    "WhenUnmet",
]
