"""The process for long texts: bounds, turns, clients that leave, and what happens when it dies or stops."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable

import psutil
import pytest

from baton.children import PYTHON, child_environment
from baton.errors import BatonError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from baton.telemetry import Counts
from baton.v1 import generation_pb2 as gen
from router.clients.preparation import TextModel, prepared
from router.clients.text_child import NICE
from router.clients.text_frames import FrameKind
from router.clients.text_queue import WAITING, WAITING_BYTES, TextQueue
from router.text.tokenisation import Language, LanguageParts
from tests.router.doubles import WAIT_S
from tests.router.tiny_model import CONTEXT, TEMPLATE, encode, tokenizer


@pytest.fixture(scope="module", name="model")
def _model() -> TextModel:
    return tiny()


def tiny() -> TextModel:
    language = Language(LanguageParts("tiny", tokenizer().to_str().encode(), TEMPLATE))
    return TextModel(language, CONTEXT, tokenizer().get_vocab_size())


class Queue(TextQueue):
    """One with a model, and a hand on its process."""

    def __init__(self, model: TextModel) -> None:
        self.counts = Counts()
        super().__init__(self.counts)
        self.model = model

    def ask(self, prompt: str, tenant: str = "") -> asyncio.Task[bytes]:
        """Waits in the queue, or is in the process, from the next turn of the loop on."""
        data = gen.GenerateRequest(prompt=prompt).SerializeToString()
        return asyncio.create_task(self.run(FrameKind.GENERATE, self.model, data, tenant))

    async def works(self) -> int:
        """That it does, and the process's id."""
        async with asyncio.timeout(WAIT_S):
            _, ids = prepared(await self.ask("hello"))
        assert list(ids) == encode("hello")
        assert self.process.pid is not None
        return self.process.pid

    async def held(self, prompt: str = "hello") -> asyncio.Task[bytes]:
        """The process is stopped with this text in it."""
        os.kill(await self.works(), signal.SIGSTOP)
        text = self.ask(prompt)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(self) == 0, "it is in the process"
        return text

    def go_on(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


@pytest.fixture(name="queue")
async def _queue(model: TextModel) -> AsyncIterator[Queue]:
    queue = Queue(model)
    yield queue
    pid = queue.process.pid
    await queue.close(Unavailable("over"))
    assert pid is None or not psutil.pid_exists(pid)


async def failure(text: Awaitable[object]) -> BatonError:
    with pytest.raises(BatonError) as caught:
        async with asyncio.timeout(WAIT_S):
            await text
    return caught.value


async def test_it_starts_once_at_low_priority_without_torch_and_keeps_its_models(queue: Queue) -> None:
    pid = await queue.works()
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    assert not any("torch" in mapped.path for mapped in psutil.Process(pid).memory_maps())
    queue.model = tiny()
    assert await queue.works() == pid
    assert queue.counts.snapshot() == {"long_texts": 2, "text_process_starts": 1}


OWNER = """
import asyncio
from tests.router.clients.test_text_queue import Queue, tiny

async def main():
    print(await Queue(tiny()).works(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_it_dies_with_the_router() -> None:
    owner = await asyncio.create_subprocess_exec(*PYTHON[:-1], "-c", OWNER, env=child_environment(), stdout=PIPE)
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    os.kill(pid, signal.SIGSTOP)
    owner.kill()
    await owner.wait()
    async with asyncio.timeout(WAIT_S):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.01)


async def test_a_process_that_is_killed_takes_one_text_with_it(queue: Queue) -> None:
    lost = await queue.held()
    others = [queue.ask("hello"), queue.ask("world")]
    await asyncio.sleep(0)
    assert queue.process.pid is not None
    os.kill(queue.process.pid, signal.SIGKILL)
    error = await failure(lost)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s
    assert [list(prepared(await text)[1]) for text in others] == [encode("hello"), encode("world")]
    counts = queue.counts.snapshot()
    assert (counts["long_texts_lost"], counts["text_process_starts"]) == (1, 2)


async def test_one_that_is_killed_at_rest_is_started_again_unseen(queue: Queue) -> None:
    process = psutil.Process(await queue.works())
    process.kill()
    async with asyncio.timeout(WAIT_S):
        while queue.process.pid is not None:
            await asyncio.sleep(0.005)
    assert await queue.works() != process.pid
    assert "long_texts_lost" not in queue.counts.snapshot()


async def test_one_that_stops_is_killed_after_the_limit(queue: Queue) -> None:
    await queue.works()
    queue.limit_s = 0.2
    error = await failure(await queue.held())
    assert isinstance(error, Unavailable)
    assert "0.2 s" in str(error)
    queue.limit_s = WAIT_S
    await queue.works()


async def test_it_is_not_started_again_without_a_pause(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.clients.text_process.MODULE", "router.clients.no_such_module")
    loop = asyncio.get_running_loop()
    started, texts = loop.time(), [queue.ask("hello") for _ in range(3)]
    for text in texts:
        assert isinstance(await failure(text), Unavailable)
    assert loop.time() - started >= 0.1 + 0.2
    monkeypatch.undo()
    await queue.works()


async def test_the_number_of_texts_is_bounded(queue: Queue) -> None:
    first = await queue.held()
    texts = [queue.ask("hello") for _ in range(WAITING)]
    error = await failure(queue.ask("hello"))
    assert isinstance(error, ResourceExhausted)
    assert (error.constraint, bool(error.retry_after_s)) == ("tokenise", True)
    assert queue.counts.snapshot()["long_texts_refused"] == 1
    queue.go_on()
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(first, *texts)
    assert len(queue) == 0


async def test_their_bytes_are_bounded(queue: Queue) -> None:
    await queue.held()
    size = 4 * 1024 * 1024 - 5
    texts = [queue.ask("x" * size) for _ in range(WAITING_BYTES // size)]
    assert isinstance(await failure(queue.ask("x" * size)), ResourceExhausted)
    for text in texts:
        text.cancel()
    await asyncio.wait(texts)
    assert len(queue) == 0
    queue.go_on()
    await queue.works()


async def test_a_tenant_that_fills_the_queue_makes_way_for_another(queue: Queue) -> None:
    await queue.held()
    texts = [queue.ask("hello", "many") for _ in range(WAITING)]
    await asyncio.sleep(0)
    other = queue.ask("world", "few")
    assert isinstance(await failure(texts[-1]), ResourceExhausted)
    queue.go_on()
    async with asyncio.timeout(WAIT_S):
        assert list(prepared(await other)[1]) == encode("world")
    assert len(queue) > WAITING - 5, "it had not to wait for all of them"


async def test_tenants_take_turns(queue: Queue) -> None:
    await queue.held()
    order: list[str] = []
    texts = []
    for tenant in ("a", "a", "a", "b", "b", "c"):
        text = queue.ask("hello", tenant)
        text.set_name(tenant)
        text.add_done_callback(lambda done: order.append(done.get_name()))
        texts.append(text)
    await asyncio.sleep(0)
    queue.go_on()
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*texts)
    assert order == ["a", "b", "c", "a", "b", "a"]


async def test_a_client_that_leaves_takes_its_text_out(queue: Queue) -> None:
    inside = await queue.held()
    waiting = queue.ask("hello")
    await asyncio.sleep(0)
    assert len(queue) == 1
    for text in (waiting, inside):
        text.cancel()
    await asyncio.wait([waiting, inside])
    assert len(queue) == 0
    queue.go_on()
    await queue.works()
    assert queue.counts.snapshot()["text_process_starts"] == 1, "a client that leaves does not cost a process"


async def test_a_refusal_is_the_texts_own_and_its_length_bounded(queue: Queue) -> None:
    wizard = gen.GenerateRequest(chat=gen.Chat(messages=[gen.ChatMessage(role="w" * 10_000)])).SerializeToString()
    error = await failure(queue.run(FrameKind.GENERATE, queue.model, wizard, ""))
    assert isinstance(error, InvalidArgument)
    assert error.field == "chat.messages[0].role"
    assert len(str(error)) < 1_200


async def test_a_fault_of_ours_ends_one_text(queue: Queue) -> None:
    pid = await queue.works()
    error = await failure(queue.run(FrameKind.LOAD, queue.model, b"no model", ""))
    assert isinstance(error, Internal)
    assert await queue.works() == pid


async def test_its_end_refuses_what_waits(queue: Queue) -> None:
    texts = [await queue.held(), queue.ask("hello"), queue.ask("hello", "b")]
    await asyncio.sleep(0)
    await queue.close(Unavailable("the end"))
    assert [str(await failure(text)) for text in (*texts, queue.ask("hello"))] == ["the end"] * 4
