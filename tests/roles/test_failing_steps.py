"""Steps, results and commands that fail: each costs its own sequence and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from baton.spec import Sampling
from decode_worker import running as decode_running
from prefill_worker import running as prefill_running
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens


async def test_a_prefill_step_fails(cluster: Cluster) -> None:
    await cluster.add_prefill(chunk_tokens=64)
    await cluster.add_decode()
    cluster.p.engine.gate.clear()
    specs = [cluster.router.spec(20, max_tokens=3) for _ in range(3)]
    await cluster.bound(specs[0])
    await until(cluster.p.engine.waiting.is_set, "the step")
    cluster.p.engine.fail = RuntimeError("out of luck")
    cluster.p.engine.gate.set()
    ended = await cluster.router.hears(cluster.p, "ended", specs[0])
    assert ended.status == 13
    assert "RuntimeError: out of luck" in ended.message
    await cluster.idle()
    for spec in specs[1:]:
        await cluster.serve(spec)


async def test_a_decode_step_fails(pair: Cluster) -> None:
    pair.d.engine.gate.clear()
    specs = [pair.router.spec(20, max_tokens=30) for _ in range(3)]
    for spec in specs:
        await pair.bound(spec)
        await pair.router.hears(pair.d, "resident", spec)
    pair.router.cancel(pair.d, specs[2])
    pair.d.engine.fail = RuntimeError("out of luck")
    pair.d.engine.gate.set()
    ended = await pair.router.hears(pair.d, "ended", specs[0])
    assert ended.status == 13
    assert "out of luck" in ended.message
    await pair.router.hears(pair.d, "freed", specs[2])
    if not pair.router.heard(pair.d, "ended", specs[1]):  # it was not in that step
        await pair.finished(specs[1])
    await pair.idle()
    await pair.serve(pair.router.spec(20, sampling=Sampling(temperature=0.0, logprobs=2)))


def breaking(working: Callable[..., Any], concerns: Callable[[Any], bool]) -> Callable[..., Any]:
    """The function, which raises the first time that its first argument is of concern."""
    raised: list[bool] = []

    def broken(first: Any, *rest: Any) -> Any:
        if concerns(first) and not raised:
            raised.append(True)
            raise ValueError("broken on purpose")
        return working(first, *rest)

    return broken


@pytest.mark.parametrize("what", ["TokenRun", "remember"])
async def test_a_prefill_result_that_raises_costs_the_others_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """All three are in one step. The first token is out already where what raises comes after it."""
    await cluster.add_prefill(chunk_tokens=256)
    await cluster.add_decode()
    specs = [cluster.router.spec(20, max_tokens=3) for _ in range(3)]
    victim = specs[0].attempt
    if what == "remember":
        admission = cluster.p.role._prompts._admission
        broken = breaking(admission.remember, lambda blocks: True)  # the first of them is the victim
        monkeypatch.setattr(admission, "remember", broken)
    else:
        broken = breaking(vars(prefill_running)["TokenRun"], lambda key: key == victim)
        monkeypatch.setattr(prefill_running, "TokenRun", broken)
    cluster.p.engine.gate.clear()
    for spec in specs:
        await cluster.bound(spec)
    cluster.p.engine.gate.set()
    ended = await cluster.router.hears(cluster.p, "ended", specs[0])
    assert (ended.status, cluster.p.count("results_failed")) == (13, 1)
    assert ended.message == "prefill failed: ValueError: broken on purpose"
    for spec in specs[1:]:
        await cluster.finished(spec)


@pytest.mark.parametrize("what", ["TokenRun", "block_digests"])
async def test_a_decode_result_that_raises_costs_the_others_nothing(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also where what raises is the end itself."""
    pair.d.engine.gate.clear()
    specs = [pair.router.spec(20, max_tokens=4) for _ in range(3)]
    for spec in specs:
        await pair.bound(spec)
        await pair.router.hears(pair.d, "resident", spec)
    concerns = {
        "TokenRun": lambda key: key == specs[0].attempt,
        "block_digests": lambda tokens: tuple(tokens[:20]) == specs[0].prompt,
    }
    working = vars(decode_running)[what]
    monkeypatch.setattr(decode_running, what, breaking(working, concerns[what]))
    pair.d.engine.gate.set()
    ended = await pair.router.hears(pair.d, "ended", specs[0])
    assert (ended.status, pair.d.count("results_failed")) == (13, 1)
    assert ended.message == "decode failed: ValueError: broken on purpose"
    for spec in specs[1:]:
        await pair.finished(spec)


@pytest.mark.parametrize("kind", ["prefill", "bind"])
async def test_a_command_that_raises_ends_its_attempt(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What it took by then is given back, and the router is told."""
    role, spec = pair.p.role, pair.router.spec(40)

    def broken(*_: Any) -> None:
        raise ValueError("broken on purpose")

    with monkeypatch.context() as patch:
        if kind == "prefill":
            patch.setattr(role._prompts, "start_waiting", broken)  # it is in the queue by then
            pair.router.prefill(pair.p, spec)
            ended = await pair.router.hears(pair.p, "ended", spec)
        else:
            await pair.started(spec)
            patch.setattr(role.senders, "to", broken)
            pair.router.bind(pair.p, spec, pair.d)
            ended = await pair.router.hears(pair.p, "ended", spec)
    assert (ended.status, ended.message) == (13, "the worker failed: ValueError: broken on purpose")
    assert pair.p.count("commands_failed") == 1
    pair.p.counts.add("commands_failed", -1)  # or the fixture finds it


async def test_a_prompt_that_never_fits(cluster: Cluster) -> None:
    await cluster.add_prefill(blocks=4)
    await cluster.add_decode()
    spec = cluster.router.spec(4 * BLOCK + 1)
    cluster.router.prefill(cluster.p, spec)
    ended = await cluster.router.hears(cluster.p, "ended", spec)
    assert ended.status == 8
    assert ended.message == "the sequence may need 5 blocks, the pool has 4"
    await cluster.serve(cluster.router.spec(4 * BLOCK))
