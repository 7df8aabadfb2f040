"""What every engine does, whatever computes the tokens: the contract of `Engine`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import SoftPrompt
from server.engine.native import NativeEngine
from server.engine.protocol import (
    Engine,
    EngineConfig,
    EngineFailedError,
    FinishReason,
    GenerationRequest,
    PrefixNotLoadedError,
    QueueFullError,
    RequestTooLongError,
    StepObserver,
    TokenEvent,
)
from tests.conftest import TINY_CONFIGS, tiny_model
from tests.engine.reference import as_cache, greedy, random_prefix
from tests.engine.subject import CONFIG, ENDLESS, Subject, request, settled, started, tokens
from tests.engine.vllm_subject import VllmSubject, needs_vllm

# Below, at and above a block of vLLM's memory, and two of them.
PREFIX_LENGTHS = (1, 3, 17, 31, 32, 33, 64)


VLLM = pytest.param("vllm-llama", marks=[pytest.mark.vllm, needs_vllm])
every_shape = pytest.mark.parametrize(
    "subject", [*(f"native-{shape}" for shape in sorted(TINY_CONFIGS)), VLLM], indirect=True
)


@pytest.fixture(params=["native-llama", "native-gpt2", VLLM])
async def subject(
    request: pytest.FixtureRequest, vllm_subject: VllmSubject
) -> AsyncIterator[Subject]:
    """Every engine. vLLM takes seconds to start, so that one is shared."""
    engine, _, shape = request.param.partition("-")
    if engine == "vllm":
        shared = await vllm_subject.get()
        shared.steps.clear()
        yield shared
        await settled(shared.engine)
        return
    loaded = tiny_model(shape)

    async def start(config: EngineConfig, observer: StepObserver) -> Engine:
        return NativeEngine(loaded, config, observer)

    async with started(loaded, start) as own:
        yield own


@dataclass(frozen=True)
class Plan:
    """A request, how many tokens of the one before it come first, and when it is cancelled."""

    prefix_length: int
    prompt: tuple[int, ...]
    new: int
    arrives_after: int
    cancelled_at: int | None


def random_plans(seed: int, count: int) -> list[Plan]:
    """Requests of every kind that come and go while others run."""
    draw = random.Random(seed)
    plans = []
    for _ in range(count):
        length = draw.choice((0, 0, *PREFIX_LENGTHS))
        new = draw.randint(1, 12)
        prompt = tuple(draw.choices(range(6, 97), k=draw.randint(1, CONFIG.max_length - 64 - 12)))
        cancelled_at = draw.choice((None, None, draw.randint(1, 6)))
        plans.append(Plan(length, prompt, new, draw.randint(0, 3), cancelled_at))
    return plans


async def load(subject: Subject, lengths: Sequence[int]) -> None:
    """Load a random prefix of each length, as versions `random-<length>`."""
    for length in lengths:
        prefix = random_prefix(subject.loaded, length, seed=length)
        await subject.engine.load_prefix(f"random-{length}", prefix)


def drop(subject: Subject, lengths: Sequence[int]) -> None:
    for length in lengths:
        subject.engine.drop_prefix(f"random-{length}")


def alone(loaded: LoadedModel, length: int, prompt: tuple[int, ...], new: int) -> list[int]:
    """The tokens of a request with such a prefix that has transformers for itself."""
    prefix = random_prefix(loaded, length, seed=length) if length else None
    return greedy(loaded, prefix, prompt, new)[0]


def version_of_length(length: int) -> str | None:
    return f"random-{length}" if length else None


async def carry_out(
    engine: Engine, plan: Plan, *, before: asyncio.Event, after: asyncio.Event, next_: int
) -> list[TokenEvent]:
    """Wait, submit, read; set `after` once there are `next_` tokens, or no more."""
    await before.wait()
    version = version_of_length(plan.prefix_length)
    stream = engine.submit(request(str(id(plan)), plan.prompt, plan.new, version))
    events: list[TokenEvent] = []
    if next_ == 0:
        after.set()
    async for event in stream:
        events.append(event)
        if len(events) >= next_:
            after.set()
        if len(events) == plan.cancelled_at:
            break
    await stream.aclose()
    after.set()
    return events


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_greedy_tokens_are_those_of_the_request_alone(subject: Subject, seed: int) -> None:
    plans = random_plans(seed, CONFIG.max_slots + CONFIG.max_waiting)
    await load(subject, PREFIX_LENGTHS)
    gates = [asyncio.Event() for _ in range(len(plans) + 1)]
    gates[0].set()
    waits = [*(plan.arrives_after for plan in plans[1:]), 0]
    found = await asyncio.gather(
        *(
            carry_out(subject.engine, plan, before=gates[i], after=gates[i + 1], next_=waits[i])
            for i, plan in enumerate(plans)
        )
    )
    drop(subject, PREFIX_LENGTHS)
    for plan, events in zip(plans, found, strict=True):
        ids = [event.chosen.token_id for event in events]
        expected = alone(subject.loaded, plan.prefix_length, plan.prompt, plan.new)
        assert ids == expected[: len(ids)], plan
        if plan.cancelled_at is None or plan.cancelled_at > len(ids):
            assert ids == expected
            ends = subject.loaded.model.generation_config.eos_token_id
            reason = FinishReason.EOS_TOKEN if ids[-1] == ends else FinishReason.LENGTH
            assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + [reason]


async def test_the_first_token_tells_how_long_the_request_waited(subject: Subject) -> None:
    events = [event async for event in subject.engine.submit(request("a"))]
    assert events[0].queue_seconds is not None
    assert 0 <= events[0].queue_seconds < 60
    assert all(event.queue_seconds is None for event in events[1:])


async def test_the_end_of_a_text_can_be_ignored(subject: Subject) -> None:
    for first in range(6, 97):  # until the model ends a text by itself
        expected = alone(subject.loaded, 0, (first,), 20)
        if len(expected) < 20:
            break
    engine = subject.engine
    assert await tokens(engine.submit(request("a", (first,), 20))) == expected
    ignoring = await tokens(engine.submit(request("b", (first,), 20, ignore_eos=True)))
    assert (ignoring[: len(expected)], len(ignoring)) == (expected, 20)
    later = len(expected) + 2
    held = await tokens(engine.submit(request("c", (first,), later, min_new_tokens=later)))
    assert len(held) == later
    assert held[: len(expected) - 1] == expected[:-1]


async def test_a_prefix_may_lie_in_memory_in_any_order(subject: Subject) -> None:
    prefix = random_prefix(subject.loaded, 5, seed=1)
    turned = prefix.mapped(lambda tensor: tensor.mT.contiguous().mT)
    await subject.engine.load_prefix("turned", subject.engine.prepare_prefix(turned))
    found = await tokens(subject.engine.submit(request("a", version="turned")))
    subject.engine.drop_prefix("turned")
    assert found == greedy(subject.loaded, prefix, (9, 10), 5)[0]


async def test_dropping_a_prefix_leaves_those_that_run_with_it(subject: Subject) -> None:
    await load(subject, [5])
    expected = alone(subject.loaded, 5, (9, 10), 20)
    stream = subject.engine.submit(request("a", new=20, version="random-5"))
    subject.engine.drop_prefix("random-5")
    assert await tokens(stream) == expected
    with pytest.raises(PrefixNotLoadedError, match="random-5"):
        subject.engine.submit(request("b", version="random-5"))


async def test_a_replaced_version_never_mixes_with_the_one_before(subject: Subject) -> None:
    """Same prompt, same prefix length, a whole block and more of it."""
    prompt = tuple(range(6, 20))
    old, new = (random_prefix(subject.loaded, 40, seed=seed) for seed in (1, 2))
    await subject.engine.load_prefix("old", old)
    before = await tokens(subject.engine.submit(request("a", prompt, version="old")))
    await subject.engine.load_prefix("new", new)
    both = await asyncio.gather(
        *(
            tokens(subject.engine.submit(request(f"{version}-{i}", prompt, version=version)))
            for i in range(2)
            for version in ("old", "new")
        )
    )
    subject.engine.drop_prefix("old")
    after = await tokens(subject.engine.submit(request("b", prompt, version="new")))
    bare = await tokens(subject.engine.submit(request("c", prompt)))
    subject.engine.drop_prefix("new")
    of_old, of_new, of_none = (
        greedy(subject.loaded, prefix, prompt, 5)[0] for prefix in (old, new, None)
    )
    assert (before, after, bare) == (of_old, of_new, of_none)
    assert both == [of_old, of_new] * 2


async def test_more_than_the_memory_holds_is_computed_again(subject: Subject) -> None:
    """vLLM's memory here has room for two such requests and not for four; see `vllm_subject`."""
    await load(subject, (33, 17))
    plans = [(33, (9, 10)), (17, tuple(range(6, 24))), (33, (11,)), (0, tuple(range(20, 50)))]
    streams = [
        subject.engine.submit(
            request(str(i), prompt, 40, version_of_length(length), ignore_eos=True)
        )
        for i, (length, prompt) in enumerate(plans)
    ]
    found = await asyncio.gather(*map(tokens, streams))
    drop(subject, (33, 17))
    await settled(subject.engine)
    assert any(step.preempted for step in subject.steps) is subject.scarce
    for (length, prompt), ids in zip(plans, found, strict=True):
        expected = alone(subject.loaded, length, prompt, 40)
        assert ids[: len(expected)] == expected
        assert len(ids) == 40


async def test_a_poisoned_prefix_fails_its_own_request_only(subject: Subject) -> None:
    spec = subject.loaded.spec
    huge = torch.full((spec.num_layers, spec.num_kv_heads, 4, spec.head_dim), 3e38)
    await subject.engine.load_prefix("poison", Prefix.of(huge, huge, method="poison"))
    neighbour = subject.engine.submit(request("good", new=20))
    with pytest.raises(EngineFailedError, match="NaN or infinity"):
        await tokens(subject.engine.submit(request("bad", (6, 7, 8), version="poison")))
    subject.engine.drop_prefix("poison")
    assert await tokens(neighbour) == alone(subject.loaded, 0, (9, 10), 20)
    # Whatever memory it left, to whoever gets it.
    prompts = [tuple(range(6 + i, 16 + i)) for i in range(CONFIG.max_slots + CONFIG.max_waiting)]
    streams = [subject.engine.submit(request(str(p[0]), p, 30)) for p in prompts]
    for prompt, found in zip(prompts, await asyncio.gather(*map(tokens, streams)), strict=True):
        assert found == alone(subject.loaded, 0, prompt, 30)


async def test_a_full_queue_refuses_and_then_takes_again(subject: Subject) -> None:
    engine = subject.engine
    most = CONFIG.max_slots + CONFIG.max_waiting
    engine.check_places("", most)
    streams = [engine.submit(GenerationRequest(str(i), (9, 10), ENDLESS)) for i in range(most)]
    with pytest.raises(QueueFullError, match="2 sequences may wait"):
        engine.submit(request("late"))
    with pytest.raises(QueueFullError, match="2 sequences may wait"):
        engine.check_places("", 1)
    await streams[0].aclose()
    late = engine.submit(request("late"))
    for stream in streams[1:]:
        await stream.aclose()
    assert await tokens(late) == alone(subject.loaded, 0, (9, 10), 5)


async def test_closing_a_stream_frees_its_slot(subject: Subject) -> None:
    streams = [
        subject.engine.submit(GenerationRequest(str(i), (9, 10), ENDLESS))
        for i in range(CONFIG.max_slots)
    ]
    for stream in streams:
        await stream.__anext__()
    assert subject.engine.stats().running == CONFIG.max_slots
    for stream in streams:
        await stream.aclose()
    await settled(subject.engine)
    with pytest.raises(StopAsyncIteration):
        await streams[0].__anext__()


async def test_lengths_over_the_limit_are_refused_with_every_number(subject: Subject) -> None:
    await load(subject, [5])
    with pytest.raises(RequestTooLongError) as error:
        subject.engine.submit(request("a", (9,) * 60, 30, "random-5"))
    told = [n in str(error.value) for n in ("5 prefix", "60 prompt", "30 new", "90")]
    assert told == [True] * 4
    assert len(await tokens(subject.engine.submit(request("b", (9,) * 60, 25, "random-5")))) <= 25
    subject.engine.drop_prefix("random-5")


async def test_logprobs_agree_with_the_request_alone(subject: Subject) -> None:
    await load(subject, (17,))
    for name, length, prompt in (("a", 0, (6, 7, 8)), ("b", 17, tuple(range(9, 29)))):
        version = version_of_length(length)
        stream = subject.engine.submit(request(name, prompt, 6, version, top_logprobs=5))
        events = [event async for event in stream]
        prefix = random_prefix(subject.loaded, length, seed=length) if length else None
        _, logits = greedy(subject.loaded, prefix, prompt, 6)
        for event, row in zip(events, logits.log_softmax(-1), strict=True):
            likeliest = row.topk(5)
            assert [t.token_id for t in event.top] == likeliest.indices.tolist()
            found = torch.tensor([t.logprob for t in event.top])
            assert torch.allclose(found, likeliest.values, atol=1e-4)
            chosen = float(row[event.chosen.token_id])
            assert event.chosen.logprob == pytest.approx(chosen, abs=1e-4)
    drop(subject, (17,))


async def test_a_seeded_sample_does_not_depend_on_its_batch(subject: Subject) -> None:
    await load(subject, (8,))
    sampling = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "ignore_eos": True}

    def sampled(name: str, seed: int) -> GenerationRequest:
        return request(name, (9, 10, 11), 12, "random-8", seed=seed, **sampling)

    own = await tokens(subject.engine.submit(sampled("alone", 2**53 - 1)))
    crowd = [
        subject.engine.submit(request("b", tuple(range(6, 40)), 9)),
        subject.engine.submit(request("c", (7,), 12, do_sample=True, seed=1)),
        subject.engine.submit(sampled("again", 2**53 - 1)),
        subject.engine.submit(sampled("other", 43)),
    ]
    *_, again, other = await asyncio.gather(*map(tokens, crowd))
    drop(subject, (8,))
    assert again == own
    assert other != own


async def test_penalties_know_the_prompt_and_not_the_prefix(subject: Subject) -> None:
    prompt, loaded = (9, 10, 11, 12, 9), subject.loaded
    await load(subject, (33,))
    found = await tokens(
        subject.engine.submit(request("a", prompt, 12, "random-33", repetition_penalty=1.7))
    )
    drop(subject, (33,))
    input_ids = torch.tensor([[9] * 33 + list(prompt)])  # generate skips what the prefix stands for
    expected = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=as_cache(random_prefix(loaded, 33, seed=33)),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.7,
    )
    assert found == expected[0, input_ids.shape[1] :].tolist()


@every_shape
async def test_text_becomes_the_prefix_the_model_computes(subject: Subject) -> None:
    text, loaded = tuple(range(6, 46)), subject.loaded
    other = subject.engine.submit(request("busy", new=30))
    prefix = await subject.engine.compute_prefix(text)
    await tokens(other)
    assert (prefix.method, prefix.fingerprint) == ("text", loaded.spec.fingerprint)
    with torch.inference_mode():
        past = loaded.model(torch.tensor([text]), use_cache=True).past_key_values
    for layer in range(loaded.spec.num_layers):
        assert torch.allclose(prefix.keys[layer], past.layers[layer].keys[0], atol=1e-4)
        assert torch.allclose(prefix.values[layer], past.layers[layer].values[0], atol=1e-4)
    await subject.engine.load_prefix("text", prefix)
    found = await tokens(subject.engine.submit(request("a", version="text")))
    subject.engine.drop_prefix("text")
    assert found == greedy(loaded, None, (*text, 9, 10), 5)[0]


@every_shape
async def test_embeddings_are_as_good_as_the_tokens_they_stand_for(subject: Subject) -> None:
    text = torch.arange(6, 46)
    embeddings = subject.loaded.model.get_input_embeddings()(text).detach()
    expected = await subject.engine.compute_prefix(tuple(text.tolist()))
    prefix = await subject.engine.compute_prefix(SoftPrompt(embeddings, "prompt-tuning"))
    assert (prefix.method, prefix.base_model) == ("prompt-tuning", subject.loaded.spec.name)
    assert torch.allclose(prefix.keys, expected.keys, atol=1e-5)
    assert torch.allclose(prefix.values, expected.values, atol=1e-5)


async def test_a_prompt_without_room_for_text_is_refused(subject: Subject) -> None:
    for length in (0, 90):
        with pytest.raises(RequestTooLongError, match=f"{length} tokens; expected 1 to 89"):
            await subject.engine.compute_prefix((9,) * length)


async def test_a_cancelled_computation_leaves_the_engine_working(subject: Subject) -> None:
    task = asyncio.create_task(subject.engine.compute_prefix((9, 10, 11)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await tokens(subject.engine.submit(request("a"))) == alone(subject.loaded, 0, (9, 10), 5)


async def test_a_prefix_of_another_shape_never_reaches_the_model(subject: Subject) -> None:
    spec = subject.loaded.spec
    wrong = torch.ones(spec.num_layers, spec.num_kv_heads + 1, 4, spec.head_dim)
    with pytest.raises(ValueError, match=rf"is \({spec.num_layers}, {spec.num_kv_heads}, 4, "):
        await subject.engine.load_prefix("bad", Prefix.of(wrong, wrong, "unchecked"))


async def test_steps_are_reported(subject: Subject) -> None:
    await load(subject, (17,))
    found = await tokens(subject.engine.submit(request("a", (9,) * 20, version="random-17")))
    drop(subject, (17,))
    await settled(subject.engine)
    assert sum(step.prefill_tokens for step in subject.steps) == 20
    assert sum(step.decode_rows for step in subject.steps) == len(found) - 1
    assert {step.stats.max_slots for step in subject.steps} == {CONFIG.max_slots}
    assert all(step.seconds >= 0 for step in subject.steps)


async def test_closing_lets_running_requests_end_and_refuses_new_ones(subject: Subject) -> None:
    async with subject.another() as engine:
        stream = engine.submit(request("a", new=30))
        computing = asyncio.create_task(engine.compute_prefix((9,) * 80))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close(drain_seconds=60))
        await asyncio.sleep(0)
        with pytest.raises(EngineFailedError, match="shutting down"):
            engine.submit(request("b"))
        with pytest.raises(EngineFailedError, match="shutting down"):
            await engine.compute_prefix((9,))
        assert await tokens(stream) == alone(subject.loaded, 0, (9, 10), 30)
        assert (await computing).prefix_length == 80
        await closing


async def test_closing_without_time_ends_what_runs(subject: Subject) -> None:
    async with subject.another() as engine:
        endless = engine.submit(GenerationRequest("a", (9, 10), ENDLESS))
        waiting = [
            engine.submit(GenerationRequest(str(i), (9, 10), ENDLESS))
            for i in range(CONFIG.max_slots)
        ]
        await engine.close()
        for stream in (endless, *waiting):
            with pytest.raises(EngineFailedError, match="shutting down"):
                await tokens(stream)
