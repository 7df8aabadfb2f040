"""Runs generation jobs for the routes: whole answers, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from prefix_store.errors import InvalidTaskIdError
from prefix_store.task_id import stored_name
from server.api.conversion import event_of, job_of, response_of, texts_of
from server.api.error_responses import AnswerTo, answers_of
from server.api.errors import CLIENT_GONE, answer_to
from server.api.schemas import GenerateRequest, GenerateResponse
from server.callers import Caller
from server.chunks import Chunk
from server.errors import ForbiddenError
from server.generation import Generation
from server.metrics import OTHER_LABEL, Metrics
from server.services import Services

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def answer(
    services: Services, caller: Caller, request: GenerateRequest
) -> list[GenerateResponse]:
    """Generate for every input; all or nothing."""
    wants_details = bool(request.parameters and request.parameters.details)
    with counted(services.metrics, caller, _task_id(request)):
        job = job_of(request, caller, stream=False)
        async with services.generator.run(job) as generations:
            chunks = await collect(generations)
    sequences = list(zip(chunks, generations, strict=True))
    groups = [sequences[i : i + job.samples] for i in range(0, len(sequences), job.samples)]
    return [
        response_of(
            sorted(group, key=lambda one: mean_logprob(one[0]), reverse=True),
            _prompt(request, text),
            wants_details,
        )
        for group, text in zip(groups, texts_of(request), strict=True)
    ]


async def stream(services: Services, caller: Caller, request: GenerateRequest) -> EventStream:
    """Start generating; an error up to here is the answer, a later one is the last event."""
    events = _events(services, caller, request)
    await anext(events)
    return EventStream(events)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        await _end([working, gone])


class CountedRoute(APIRoute):
    """Counts, too, the requests that are refused before it is known what they ask for."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, counting."""
        handler = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await handler(request)
            except (RequestValidationError, HTTPException, ForbiddenError) as error:
                metrics: Metrics = request.app.state.services.metrics
                status = answers_of(request.url.path)(error).status
                metrics.requests.labels(OTHER_LABEL, str(status)).inc()
                raise

        return counted


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends the response, the generation has ended with it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], answer_to: AnswerTo = answer_to) -> None:
        self._events = events
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_until_error(events, answer_to), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _events(
    services: Services, caller: Caller, request: GenerateRequest
) -> AsyncGenerator[bytes]:
    """An empty item once the job runs, then each token's event."""
    with counted(services.metrics, caller, _task_id(request)):
        job = job_of(request, caller, stream=True)
        async with services.generator.run(job) as [generation]:
            yield b""
            prompt = _prompt(request, texts_of(request)[0])
            async for chunk in generation:
                event = event_of(chunk, generation.usage, prompt)
                yield event_bytes(event.model_dump_json(exclude_unset=True))


async def _until_error(events: AsyncGenerator[bytes], answer_to: AnswerTo) -> AsyncGenerator[bytes]:
    """The events, and the error that ends them early as the last one."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        logger.warning("a stream ended with an error", exc_info=error)
        yield event_bytes(answer_to(error).body())


def event_bytes(data: str) -> bytes:
    """One server-sent event."""
    return f"data:{data}\n\n".encode()


def mean_logprob(chunks: Sequence[Chunk]) -> float:
    """What `best_of` goes by."""
    return sum(chunk.token.logprob for chunk in chunks) / max(1, len(chunks))


def _prompt(request: GenerateRequest, text: str) -> str:
    """What goes in front of the generated text."""
    return text if request.parameters and request.parameters.return_full_text else ""


async def collect(generations: Sequence[Generation]) -> list[list[Chunk]]:
    """Every sequence's chunks; on an error the rest is stopped before it is raised."""
    return await _all([_collect(generation) for generation in generations])


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Chunk]]:
    """The chunks of all sequences as they come, each with its sequence's number."""
    queue: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def feed(number: int, generation: Generation) -> None:
        async for chunk in generation:
            queue.put_nowait((number, chunk))

    async def feed_all() -> None:
        try:
            await _all([feed(number, one) for number, one in enumerate(generations)])
        finally:
            queue.put_nowait(None)

    feeding = asyncio.create_task(feed_all())
    try:
        while (item := await queue.get()) is not None:
            yield item
        await feeding
    finally:
        await _end([feeding])


async def _collect(generation: Generation) -> list[Chunk]:
    return [chunk async for chunk in generation]


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result; on an error the rest is stopped before it is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _task_id(request: GenerateRequest) -> str | None:
    return request.task_id or (request.parameters and request.parameters.adapter_id) or None


@contextmanager
def counted(
    metrics: Metrics, caller: Caller, task_id: str | None, answer_to: AnswerTo = answer_to
) -> Iterator[None]:
    """Count one request, for a task as its caller calls it, by how it ends."""
    if task_id is not None:
        with suppress(InvalidTaskIdError):
            task_id = stored_name(caller.tenant, task_id)
    status = 200
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        status = CLIENT_GONE
        raise
    except Exception as error:
        status = answer_to(error).status
        raise
    finally:
        metrics.requests.labels(metrics.tasks.unchecked(task_id), str(status)).inc()
