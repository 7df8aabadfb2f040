"""What the conformance tests are about: an engine, and the model it runs, to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from prefix_store.model_loading import LoadedModel
from server.engine.protocol import (
    Engine,
    EngineConfig,
    GenerationRequest,
    SamplingParams,
    StepObserver,
    StepStats,
    TokenStream,
)

CONFIG = EngineConfig(max_slots=4, max_length=90, prefill_tokens=16, max_waiting=2)
ENDLESS = SamplingParams(max_new_tokens=50, ignore_eos=True)

Start = Callable[[EngineConfig, StepObserver], Awaitable[Engine]]


@dataclass(frozen=True)
class Subject:
    """An engine started with `CONFIG`.

    Attributes:
        loaded: its model in transformers, the oracle.
        steps: what it reported of its steps.
        another: starts one more, with the same model, and closes it.
        scarce: its memory does not hold as many of the longest sequences as may run at once.
    """

    engine: Engine
    loaded: LoadedModel
    steps: list[StepStats]
    another: Callable[[], AbstractAsyncContextManager[Engine]]
    scarce: bool


@asynccontextmanager
async def started(
    loaded: LoadedModel, start: Start, *, scarce: bool = False
) -> AsyncIterator[Subject]:
    """Start an engine; close it on the way out."""

    @asynccontextmanager
    async def running(observer: StepObserver = lambda _: None) -> AsyncIterator[Engine]:
        engine = await start(CONFIG, observer)
        try:
            yield engine
        finally:
            await engine.close()

    steps: list[StepStats] = []
    async with running(steps.append) as engine:
        yield Subject(engine, loaded, steps, running, scarce)


def request(
    name: str,
    prompt: tuple[int, ...] = (9, 10),
    new: int = 5,
    version: str | None = None,
    **sampling: float | int | bool,
) -> GenerationRequest:
    """A request, greedy unless told otherwise."""
    return GenerationRequest(name, prompt, SamplingParams(new, **sampling), version)


async def tokens(stream: TokenStream) -> list[int]:
    """The ids of every token."""
    return [event.chosen.token_id async for event in stream]


async def settled(engine: Engine) -> None:
    """Until the engine reports itself empty."""
    async with asyncio.timeout(20):
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.001)
