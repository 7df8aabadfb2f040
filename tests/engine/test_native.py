"""The engine on its thread, as the server uses it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from prefix_store.errors import InvalidPrefixError
from prefix_store.model_loading import LoadedModel
from prefix_store.soft_prompt import SoftPrompt
from server.engine.native import NativeEngine
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    GenerationRequest,
    QueueFullError,
    SamplingParams,
    StepStats,
    TokenStream,
)
from tests.conftest import tiny_model
from tests.engine.reference import greedy

CONFIG = EngineConfig(max_slots=2, max_length=64, prefill_tokens=16, max_waiting=1)
ENDLESS = SamplingParams(max_new_tokens=50, frequency_penalty=5.0)


@asynccontextmanager
async def running(
    loaded: LoadedModel, config: EngineConfig = CONFIG, steps: list[StepStats] | None = None
) -> AsyncIterator[NativeEngine]:
    engine = NativeEngine(loaded, config, on_step=None if steps is None else steps.append)
    try:
        yield engine
    finally:
        await engine.close()


def request(
    name: str, prompt: tuple[int, ...] = (9, 10), new: int = 5, version: str | None = None
) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_new_tokens=new), version)


async def tokens(stream: TokenStream) -> list[int]:
    return [event.chosen.token_id async for event in stream]


async def test_each_beam_takes_a_place_in_the_queue(tiny_llama: LoadedModel) -> None:
    beams = replace(ENDLESS, num_beams=2, frequency_penalty=0.0, ignore_eos=True)
    async with running(tiny_llama) as engine:
        search = engine.submit(GenerationRequest("search", (9, 10), beams))
        with pytest.raises(QueueFullError, match="each beam being one"):
            engine.submit(GenerationRequest("late", (9, 10), beams))
        alone = engine.submit(request("alone"))
        with pytest.raises(QueueFullError):
            engine.submit(request("late"))
        await search.aclose()
        assert await tokens(alone) == greedy(tiny_llama, None, (9, 10), 5)[0]


async def test_a_flood_does_not_shut_another_tenant_out(tiny_llama: LoadedModel) -> None:
    async with running(tiny_llama) as engine:
        for i in range(3):
            engine.submit(GenerationRequest(str(i), (9, 10), ENDLESS, tenant="flood"))
        with pytest.raises(QueueFullError, match="the queue is full"):
            engine.submit(GenerationRequest("more", (9, 10), ENDLESS, tenant="flood"))
        guest = GenerationRequest("guest", (9, 10), SamplingParams(5), tenant="guest")
        assert await tokens(engine.submit(guest)) == greedy(tiny_llama, None, (9, 10), 5)[0]
        with pytest.raises(ValueError, match="a weight is a number above 0, not 0"):
            engine.submit(GenerationRequest("none", (9, 10), ENDLESS, weight=0))


async def test_a_long_computation_lets_others_decode(tiny_llama: LoadedModel) -> None:
    config = EngineConfig(max_slots=2, max_length=90, prefill_tokens=1)
    async with running(tiny_llama, config) as engine:
        computing = asyncio.create_task(engine.compute_prefix((9,) * 80))
        await asyncio.sleep(0)
        found = await tokens(engine.submit(request("a", new=8)))
        assert not computing.done()
        assert found == greedy(tiny_llama, None, (9, 10), 8)[0]
        assert (await computing).prefix_length == 80


async def test_a_computation_ends_with_the_engine(tiny_llama: LoadedModel) -> None:
    config = EngineConfig(max_slots=2, max_length=90, prefill_tokens=1)
    async with running(tiny_llama, config) as engine:
        computing = asyncio.create_task(engine.compute_prefix((9,) * 80))
        await asyncio.sleep(0)
        await engine.close(drain_seconds=30)
        assert (await computing).prefix_length == 80
        with pytest.raises(EngineFailedError, match="shutting down"):
            await engine.compute_prefix((9,))
    async with running(tiny_llama, config) as engine:
        computing = asyncio.create_task(engine.compute_prefix((9,) * 80))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineFailedError, match="shutting down"):
            await computing


async def test_an_engine_that_breaks_fails_whoever_waits(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In so many chunks that the computation cannot end before the step that breaks.
    config = EngineConfig(max_slots=2, max_length=90, prefill_tokens=1)
    async with running(tiny_llama, config) as engine:
        monkeypatch.setattr(engine._core, "step", lambda: 1 // 0)
        stream = engine.submit(request("a"))
        computing = asyncio.create_task(engine.compute_prefix((9,) * 80))
        with pytest.raises(EngineFailedError, match="restart"):
            await tokens(stream)
        with pytest.raises(EngineFailedError):
            await computing


async def test_a_soft_prompt_that_breaks_the_model_is_refused() -> None:
    gpt2 = tiny_model("gpt2")  # whose norm subtracts what is about to overflow
    huge = torch.full((3, gpt2.spec.embedding_size), 3e38)
    huge[:, ::2] *= -1
    async with running(gpt2) as engine:
        with pytest.raises(InvalidPrefixError, match="expected finite"):
            await engine.compute_prefix(SoftPrompt(huge, "x"))
        assert await tokens(engine.submit(request("a"))) == greedy(gpt2, None, (9, 10), 5)[0]


async def test_close_without_time_ends_running_requests(tiny_llama: LoadedModel) -> None:
    stepped, told = threading.Event(), threading.Event()

    def stand_still(_: StepStats) -> None:
        stepped.set()
        told.wait(timeout=10)

    engine = NativeEngine(tiny_llama, CONFIG, on_step=stand_still)
    stream = engine.submit(GenerationRequest("a", (9, 10), ENDLESS))
    await asyncio.to_thread(stepped.wait, 10)
    closing = asyncio.create_task(engine.close())
    while engine._commands.empty():
        await asyncio.sleep(0)
    told.set()
    await closing
    with pytest.raises(EngineFailedError, match="shutting down"):
        await tokens(stream)


async def test_a_failed_step_ends_its_requests_and_not_the_engine(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tiny_llama) as engine:
        with monkeypatch.context() as fault:
            fault.setattr(engine._core, "_compute", lambda spans: spans[len(spans)])
            with pytest.raises(EngineFailedError, match="try again"):
                await tokens(engine.submit(request("a")))
        assert await tokens(engine.submit(request("b"))) == greedy(tiny_llama, None, (9, 10), 5)[0]
