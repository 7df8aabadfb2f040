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
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import SoftPrompt
from server.engine.native import NativeEngine
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    FinishReason,
    GenerationRequest,
    PrefixNotLoadedError,
    QueueFullError,
    RequestTooLongError,
    SamplingParams,
    StepStats,
    TokenStream,
)
from tests.conftest import tiny_model
from tests.engine.reference import as_cache, greedy, random_prefix

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


async def settled(engine: NativeEngine) -> None:
    """Until the engine reports itself empty."""
    async with asyncio.timeout(20):
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.001)


async def test_tokens_of_a_loaded_prefix(tiny_llama: LoadedModel) -> None:
    prefix = random_prefix(tiny_llama, 5, seed=1)
    async with running(tiny_llama) as engine:
        await engine.load_prefix("v1", prefix)
        events = [e async for e in engine.submit(request("a", version="v1"))]
        expected, _ = greedy(tiny_llama, prefix, (9, 10), 5)
        assert [e.chosen.token_id for e in events] == expected
        assert events[-1].finish_reason in {FinishReason.LENGTH, FinishReason.EOS_TOKEN}
        assert events[0].queue_seconds is not None
        assert all(e.queue_seconds is None for e in events[1:])


async def test_a_prefix_may_lie_in_memory_in_any_order(tiny_llama: LoadedModel) -> None:
    prefix = random_prefix(tiny_llama, 5, seed=1)
    turned = prefix.mapped(lambda tensor: tensor.mT.contiguous().mT)
    async with running(tiny_llama) as engine:
        await engine.load_prefix("v1", turned)
        found = await tokens(engine.submit(request("a", version="v1")))
        assert found == greedy(tiny_llama, prefix, (9, 10), 5)[0]


async def test_dropping_a_prefix_leaves_those_that_run_with_it(tiny_llama: LoadedModel) -> None:
    prefix = random_prefix(tiny_llama, 5, seed=1)
    async with running(tiny_llama) as engine:
        await engine.load_prefix("v1", prefix)
        stream = engine.submit(request("a", new=20, version="v1"))
        engine.drop_prefix("v1")
        expected, _ = greedy(tiny_llama, prefix, (9, 10), 20)
        assert await tokens(stream) == expected
        with pytest.raises(PrefixNotLoadedError, match="v1"):
            engine.submit(request("b", version="v1"))


async def test_a_full_queue_refuses_and_then_takes_again(tiny_llama: LoadedModel) -> None:
    async with running(tiny_llama) as engine:
        streams = [engine.submit(GenerationRequest(str(i), (9, 10), ENDLESS)) for i in range(3)]
        with pytest.raises(QueueFullError, match="the queue is full: 1 sequences may wait"):
            engine.submit(request("late"))
        await streams[0].aclose()
        assert (
            await tokens(engine.submit(request("late"))) == greedy(tiny_llama, None, (9, 10), 5)[0]
        )


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


async def test_closing_a_stream_frees_its_slot(tiny_llama: LoadedModel) -> None:
    async with running(tiny_llama) as engine:
        streams = [engine.submit(GenerationRequest(n, (9, 10), ENDLESS)) for n in "ab"]
        for stream in streams:
            await stream.__anext__()
        for stream in streams:
            await stream.aclose()
        await settled(engine)
        with pytest.raises(StopAsyncIteration):
            await streams[0].__anext__()


async def test_lengths_over_the_slot_are_refused_with_every_number(tiny_llama: LoadedModel) -> None:
    async with running(tiny_llama) as engine:
        await engine.load_prefix("v1", random_prefix(tiny_llama, 5, seed=1))
        with pytest.raises(RequestTooLongError) as error:
            engine.submit(request("a", prompt=(9,) * 40, new=20, version="v1"))
        assert [n in str(error.value) for n in ("5 prefix", "40 prompt", "20 new", "64")] == [
            True
        ] * 4


async def test_text_becomes_the_prefix_the_model_computes(tiny: LoadedModel) -> None:
    text = tuple(range(6, 40))
    async with running(tiny) as engine:
        prefix = await engine.compute_prefix(text)
        assert prefix.method == "text"
        assert prefix.fingerprint == tiny.spec.fingerprint
        with torch.inference_mode():
            past = tiny.model(torch.tensor([text]), use_cache=True).past_key_values
        for layer in range(tiny.spec.num_layers):
            assert torch.allclose(prefix.keys[layer], past.layers[layer].keys[0], atol=1e-4)
            assert torch.allclose(prefix.values[layer], past.layers[layer].values[0], atol=1e-4)
        await engine.load_prefix("v", prefix)
        found = await tokens(engine.submit(request("a", version="v")))
        assert found == greedy(tiny, None, (*text, 9, 10), 5)[0]
        assert as_cache(prefix).get_seq_length() == len(text)
        await settled(engine)


async def test_embeddings_are_as_good_as_the_tokens_they_stand_for(tiny: LoadedModel) -> None:
    text = torch.arange(6, 40)
    embeddings = tiny.model.get_input_embeddings()(text).detach()
    async with running(tiny) as engine:
        expected = await engine.compute_prefix(tuple(text.tolist()))
        prefix = await engine.compute_prefix(SoftPrompt(embeddings, "prompt-tuning"))
    assert (prefix.method, prefix.base_model) == ("prompt-tuning", tiny.spec.name)
    assert torch.allclose(prefix.keys, expected.keys, atol=1e-5)
    assert torch.allclose(prefix.values, expected.values, atol=1e-5)


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


async def test_a_prompt_without_room_for_text_is_refused(tiny_llama: LoadedModel) -> None:
    async with running(tiny_llama) as engine:
        for length in (0, 64):
            with pytest.raises(RequestTooLongError, match=f"{length} tokens; expected 1 to 63"):
                await engine.compute_prefix((9,) * length)


async def test_a_soft_prompt_that_breaks_the_model_is_refused() -> None:
    gpt2 = tiny_model("gpt2")  # whose norm subtracts what is about to overflow
    huge = torch.full((3, gpt2.spec.embedding_size), 3e38)
    huge[:, ::2] *= -1
    async with running(gpt2) as engine:
        with pytest.raises(InvalidPrefixError, match="expected finite"):
            await engine.compute_prefix(SoftPrompt(huge, "x"))
        assert await tokens(engine.submit(request("a"))) == greedy(gpt2, None, (9, 10), 5)[0]


async def test_a_cancelled_computation_leaves_the_engine_working(tiny_llama: LoadedModel) -> None:
    async with running(tiny_llama) as engine:
        task = asyncio.create_task(engine.compute_prefix((9, 10, 11)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await tokens(engine.submit(request("a"))) == greedy(tiny_llama, None, (9, 10), 5)[0]


async def test_close_drains_running_requests_and_refuses_new(tiny_llama: LoadedModel) -> None:
    engine = NativeEngine(tiny_llama, CONFIG)
    stream = engine.submit(request("a", new=30))
    closing = asyncio.create_task(engine.close(drain_seconds=30))
    await asyncio.sleep(0)
    with pytest.raises(EngineFailedError, match="shutting down"):
        engine.submit(request("b"))
    assert await tokens(stream) == greedy(tiny_llama, None, (9, 10), 30)[0]
    await closing


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


async def test_a_prefix_of_another_shape_never_reaches_the_model(tiny_llama: LoadedModel) -> None:
    spec = tiny_llama.spec
    wrong = torch.ones(spec.num_layers, spec.num_kv_heads + 1, 4, spec.head_dim)
    async with running(tiny_llama) as engine:
        with pytest.raises(ValueError, match=r"\(2, 2, 4, 16\)"):
            await engine.load_prefix("bad", Prefix.of(wrong, wrong, "unchecked"))


async def test_steps_are_reported(tiny_llama: LoadedModel) -> None:
    steps: list[StepStats] = []
    async with running(tiny_llama, steps=steps) as engine:
        found = await tokens(engine.submit(request("a", prompt=(9,) * 20)))
    assert sum(s.prefill_tokens for s in steps) == 20
    assert sum(s.decode_rows for s in steps) == len(found) - 1
    assert {s.stats.max_slots for s in steps} == {2}
